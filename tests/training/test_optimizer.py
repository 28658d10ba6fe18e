"""Learning-rate multipliers of the vision tower against Long-VITA's stage 2."""

from __future__ import annotations

import pytest

from megatron_vita.training.optimizer import tower_lr_multiplier


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.vision_model.position_embeddings.weight", 0.00718),
        ("module.vision_model.conv1.bias", 0.00718),
        ("module.vision_model.decoder.layers.0.mlp.linear_fc1.weight", 0.00798),
        ("module.vision_model.decoder.layers.23.ls1", 0.09),
        ("module.vision_model.class_token", 0.1),
    ],
)
def test_multipliers_of_the_reference(name: str, expected: float) -> None:
    assert tower_lr_multiplier(name, num_layers=24, mult=0.1, decay_rate=0.9) == pytest.approx(expected, rel=1e-3)


def test_without_decay_every_part_has_the_same_rate() -> None:
    names = ["vision_model.conv1.weight", "vision_model.decoder.layers.1.ls2", "vision_model.class_token"]
    assert {tower_lr_multiplier(name, num_layers=2, mult=0.5, decay_rate=1.0) for name in names} == {0.5}
