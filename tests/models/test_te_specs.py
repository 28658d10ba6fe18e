"""The `te` layer specs write and read the checkpoints of the `local` ones; their layers are stubs on CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.config import ParallelConfig
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.checkpoint import tiny
from tests.models.parity import MODEL, VISION, inputs_of, make_packed, named, stage_of
from tests.models.te_stubs import transformer_engine_stubs
from tests.models.test_build import KEYS
from tests.models.test_vita_parallel import SP2
from tests.models.test_vita_towers import TOWERS
from tests.ranks import run_ranks


def _check_keys() -> None:
    from megatron.core.dist_checkpointing.mapping import apply_factories

    groups = build_groups(ParallelConfig())
    with transformer_engine_stubs():
        (model,) = build_model(stage_of({}), groups)
    assert any("_extra_state" in name for name in model.state_dict()), "the stubs have what must not be stored"
    assert {name: tuple(one.shape) for name, one in named(model)} == KEYS
    state = model.sharded_state_dict()
    apply_factories(state)
    flat = [piece for one in state.values() for piece in (one if isinstance(one, list) else [one])]
    assert {piece.key: tuple(piece.global_shape) for piece in flat} == KEYS
    destroy_groups()


def test_te_specs_have_the_keys_and_shapes_of_the_contract() -> None:
    run_ranks(1, _check_keys)


def _check_exchange(root: str, tower: dict[str, Any], te_saves: bool) -> None:
    """Save under one, load under the other: the same losses, in a split and sequence-parallel layout."""
    vision = dataclasses.replace(VISION, **tower)
    model = dataclasses.replace(MODEL, vision=vision)
    settings = stage_of(SP2, model=model)
    groups = build_groups(settings.parallel)
    (packed_seq, *_) = make_packed()

    def built(te: bool, fresh: bool) -> Any:
        if not te:
            return build_model(settings, groups, dtype=torch.float64, fresh=fresh)
        with transformer_engine_stubs():
            return build_model(settings, groups, dtype=torch.float64, fresh=fresh)

    one = built(te_saves, True)
    with torch.no_grad():
        for parameter in one[0].parameters():
            parameter.add_(0.1)  # norms and biases away from one and zero
    folder = checkpoint.save(root, one, None, None, tiny.state(settings, 1), groups)
    other = built(not te_saves, False)
    checkpoint.load_weights(folder, other)
    assert not any("_extra_state" in key for key in checkpoint.tensor_digests(folder))
    want, got = (chunks[0](**inputs_of(packed_seq, groups)) for chunks in (one, other))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize("te_saves", [True, False], ids=["te to local", "local to te"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_checkpoint_goes_between_the_specs(tmp_path: Path, name: str, te_saves: bool) -> None:
    run_ranks(2, _check_exchange, str(tmp_path), TOWERS[name], te_saves)
