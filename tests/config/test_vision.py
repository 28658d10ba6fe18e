"""How many tiles the vision tower encodes at once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.config import VisionConfig
from megatron_vita.config.load import flag_names
from megatron_vita.errors import ConfigError

INTERN_VIT_6B = VisionConfig(
    num_layers=45,
    hidden_size=3200,
    ffn_hidden_size=12800,
    num_attention_heads=25,
    normalization="RMSNorm",
    add_qkv_bias=False,
    qk_layernorm=True,
)
SIGLIP = VisionConfig(
    model_type="siglip",
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    image_size=384,
    patch_size=16,
    image_norm="siglip",
)
BFLOAT16 = 2


@pytest.mark.parametrize(
    ("vision", "ranks", "trained", "frozen"),
    [(VisionConfig(), 1, 2, 7), (INTERN_VIT_6B, 1, 1, 7), (INTERN_VIT_6B, 8, 1, 7), (SIGLIP, 1, 3, 14)],
)
def test_the_default_follows_from_the_activations(vision: VisionConfig, ranks: int, trained: int, frozen: int) -> None:
    assert vision.tiles_at_once(trained=True, element_size=BFLOAT16, ranks=ranks) == trained
    assert vision.tiles_at_once(trained=False, element_size=BFLOAT16, ranks=ranks) == frozen


def test_the_bytes_of_a_tile() -> None:
    """10 tensors of the hidden size and two of the MLP's in each of 24 blocks: 907 MB."""
    expected = 24 * 1025 * 2 * (10 * 1024 + 2 * 4096)
    assert VisionConfig().activation_bytes(trained=True, element_size=BFLOAT16) == expected


@given(
    layers=st.integers(1, 64),
    heads=st.integers(1, 32),
    patches=st.integers(1, 64),
    trained=st.booleans(),
    ranks=st.sampled_from([1, 2, 4, 8]),
)
def test_the_default_keeps_within_its_bounds(layers: int, heads: int, patches: int, trained: bool, ranks: int) -> None:
    vision = VisionConfig(
        num_layers=layers, hidden_size=64 * heads, ffn_hidden_size=256 * heads, num_attention_heads=heads,
        image_size=28 * patches,
    )  # fmt: skip
    at_once = vision.tiles_at_once(trained=trained, element_size=BFLOAT16, ranks=ranks)
    each = vision.activation_bytes(trained=trained, element_size=BFLOAT16, ranks=ranks)
    assert at_once == 1 or (at_once * each <= 2 * 1024**3 and at_once * vision.num_positions <= 8192)
    assert (at_once + 1) * each > 2 * 1024**3 or (at_once + 1) * vision.num_positions > 8192
    assert dataclasses.replace(vision, tiles_per_batch=3).tiles_at_once(trained=trained, element_size=BFLOAT16) == 3


def test_the_setting_has_a_flag_and_a_bound() -> None:
    assert flag_names()["--vision-tiles-per-batch"] == "model.vision.tiles_per_batch"
    with pytest.raises(ConfigError, match="tiles_per_batch=0 must be at least 1"):
        VisionConfig(tiles_per_batch=0)
