"""Inverse frequencies and attention factor of every scaling, against transformers and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checks import plain_rotary
from megatron_vita.config import ModelConfig, with_rope_scaling
from megatron_vita.parallel.rotary import RotaryTable, inverse_frequencies

pytest.importorskip("transformers")

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _model(head: int, share: float = 1.0, base: float = 1e6) -> ModelConfig:
    return ModelConfig(kv_channels=head, rotary_percent=share, rotary_base=base)


def _stock(model: ModelConfig, rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and attention factor, through its GLM, whose heads may be rotated in part."""
    from transformers import GlmConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = GlmConfig(
        head_dim=model.head_dim,
        partial_rotary_factor=model.rotary_percent,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_theta": model.rotary_base, **rope},
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))


def _check(model: ModelConfig, rope: dict[str, Any]) -> None:
    wanted, wanted_factor = _stock(model, rope)
    scaled = with_rope_scaling(model, rope)
    frequencies, factor = inverse_frequencies(scaled)
    assert factor == pytest.approx(wanted_factor, rel=1e-15)
    assert torch.equal(frequencies, wanted)
    plain, plain_factor = plain_rotary.frequencies(scaled)
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=0)  # float32 in another order
    assert plain_factor == pytest.approx(wanted_factor, rel=1e-14)


@pytest.mark.parametrize("head", [2, 64, 80, 128])
@pytest.mark.parametrize("base", [1e4, 1e6, 1e7])
@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {**YARN, "factor": 1.0},
        {**YARN, "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707},
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
        {**YARN, "mscale": 1.0},
        {**YARN, "attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 16, "beta_slow": 2.5},
        {**YARN, "beta_fast": None, "beta_slow": 0},
        {**YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False},
        {**YARN, "original_max_position_embeddings": 7},
        {"rope_type": "linear", "factor": 4},
        {"rope_type": "linear", "factor": 1.7},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0},
        {**LLAMA3, "original_max_position_embeddings": 1000},
    ],
)
def test_frequencies_are_those_of_transformers(head: int, base: float, rope: dict[str, Any]) -> None:
    _check(_model(head, base=base), rope)


_PLACE = {
    "factor": st.floats(1, 1000),
    "original_max_position_embeddings": st.integers(2, 1 << 20),
}
_YARN = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), **_PLACE},
    optional={
        "attention_factor": st.none() | st.floats(0.01, 10),
        "beta_fast": st.none() | st.floats(4, 100),
        "beta_slow": st.none() | st.floats(0.01, 4),
        "mscale": st.none() | st.just(0) | st.floats(0.01, 3),
        "mscale_all_dim": st.none() | st.just(0) | st.floats(0.01, 3),
        "truncate": st.booleans(),
    },
)
_LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        **_PLACE,
        "low_freq_factor": st.floats(0.1, 2),
        "high_freq_factor": st.floats(2.5, 20),
    }
)
_LINEAR = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": _PLACE["factor"]})


@given(
    rope=_YARN | _LLAMA3 | _LINEAR,
    pairs=st.integers(1, 64),
    share=st.sampled_from([1.0, 0.5]),
    base=st.floats(2, 1e8),
)
@settings(deadline=None)
def test_frequencies_of_any_scaling_are_those_of_transformers(
    rope: dict[str, Any], pairs: int, share: float, base: float
) -> None:
    model = _model(int(2 * pairs / share), share, base)
    _check(model, rope)


@pytest.mark.parametrize("rope", [None, YARN, {**YARN, "truncate": False, "attention_factor": 0.5}, LLAMA3])
def test_a_table_far_beyond_the_original_length_is_that_of_transformers(rope: dict[str, Any] | None) -> None:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    model = with_rope_scaling(_model(64), rope)
    config = Qwen2Config(
        head_dim=64,
        rope_theta=model.rotary_base,
        rope_scaling=dict(rope) if rope else None,
        max_position_embeddings=32768,
    )
    positions = torch.tensor([[0, 1, 32767, 32768, 131071, 1_048_575, 16_777_215]])
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = RotaryTable(model)(positions, dtype)
        wanted = Qwen2RotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions)
        for one, other in zip((cos, sin), wanted, strict=True):
            assert torch.equal(one[:, 0], other[0, :, :32])


def test_without_a_scaling_the_table_is_the_plain_one() -> None:
    """Training where nothing is set: cosines and sines are multiplied by nothing, not even by 1."""
    model = ModelConfig()
    frequencies, factor = inverse_frequencies(model)
    assert factor == 1
    plain = 1.0 / (1e6 ** (torch.arange(0, 32, 2).float() / 32))
    assert torch.equal(frequencies, plain)
