"""Rotary position embedding (RoPE) for tokens at arbitrary position ids.

VitaCoreAttention applies it instead of megatron-core's SelfAttention: cosines and sines are computed once per packed
sequence instead of once per layer, and the backward is a rotation by the negative angle. The first r numbers of a head
turn in pairs (x[i], x[i + r/2]), as in Hugging Face transformers, or (x[2i], x[2i + 1]) if interleaved (GLM-4).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vita.config import ModelConfig
from megatron_vita.device import torch_device


def inverse_frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Angles a position, and the factor of their cosines and sines, as in transformers (modeling_rope_utils).

    float32 as in the published models: float64 would change their logits at far positions.

    Args:
        model: its rotary settings and the size of its heads.

    Returns:
        (float32 [rotary_dim / 2] on the CPU, attention factor: 1 without YaRN).
    """
    dim, base = model.rotary_dim, model.rotary_base
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / (base**exponents)
    match model.rope_type:
        case "linear":
            assert model.rotary_seq_len_interpolation_factor is not None
            return frequencies / model.rotary_seq_len_interpolation_factor, 1.0
        case "llama3":
            return _llama3(frequencies, model), 1.0
        case "yarn":
            assert model.yarn_rotary_scaling_factor is not None
            slow = 1.0 / (model.yarn_rotary_scaling_factor * base**exponents)
            kept = 1 - _yarn_ramp(model)
            return slow * (1 - kept) + frequencies * kept, yarn_attention_factor(model)
    return frequencies, 1.0


def yarn_attention_factor(model: ModelConfig) -> float:
    """YaRN's factor of cosines and sines, whose square is the inverse temperature of attention (arXiv:2309.00071, eq.
    22; with mscale DeepSeek's quotient)."""
    if model.yarn_attention_factor is not None:
        return model.yarn_attention_factor
    assert model.yarn_rotary_scaling_factor is not None
    log = math.log(model.yarn_rotary_scaling_factor)
    if model.yarn_mscale is None or model.yarn_mscale_all_dim is None:
        return 0.1 * log + 1.0
    return (0.1 * model.yarn_mscale * log + 1.0) / (0.1 * model.yarn_mscale_all_dim * log + 1.0)


def _llama3(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Llama 3.1: frequencies that turn less than low_freq_factor times in the original length are divided by the
    factor, those that turn more than high_freq_factor times are kept, those between are interpolated linearly."""
    assert model.rope_scaling_factor is not None
    length = model.rope_scaling_original_max_position_embeddings
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    waves = 2 * math.pi / frequencies
    kept = (length / waves - low) / (high - low)
    divided = frequencies / model.rope_scaling_factor
    between = (1 - kept) * frequencies / model.rope_scaling_factor + kept * frequencies
    return torch.where(waves > length / low, divided, torch.where(waves < length / high, frequencies, between))


def _yarn_ramp(model: ModelConfig) -> Tensor:
    """float32 [rotary_dim / 2]: 0 where a frequency is kept, 1 where it is divided, and a ramp between."""
    dim, length = model.rotary_dim, model.yarn_original_max_position_embeddings
    assert length is not None

    def dimension(turns: float) -> float:  # whose frequency turns so often in the original length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    first, last = dimension(model.yarn_beta_fast), dimension(model.yarn_beta_slow)
    if model.yarn_correction_range_round_to_int:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # transformers' and megatron-core's way around a division by zero
    return ((torch.arange(dim // 2).float() - first) / (last - first)).clamp(0, 1)


class RotaryTable(nn.Module):
    """Computes cosines and sines of position ids; has no parameters and no buffers."""

    def __init__(self, model: ModelConfig) -> None:
        """Compute the inverse frequencies of a model's rotary settings."""
        super().__init__()
        # Not a buffer: megatron-core's Float16Module would cast it to bfloat16, which cannot tell far positions apart.
        frequencies, self._attention_factor = inverse_frequencies(model)
        self._inverse_frequency = frequencies.to(torch_device())

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position ids int64 [1, t] -> cosines and sines [t, 1, r / 2] each, computed in float32, cast to `dtype`.

        With YaRN both are multiplied by its attention factor: so are queries and keys, and their product by its square.
        """
        self._inverse_frequency = self._inverse_frequency.to(positions.device)
        angles = positions.reshape(-1, 1, 1).float() * self._inverse_frequency
        cos, sin = angles.cos(), angles.sin()
        if self._attention_factor != 1:
            cos, sin = cos * self._attention_factor, sin * self._attention_factor
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys by the angles of their tokens; differentiable in x.

    Args:
        x: [t, heads, d].
        table: cosines and sines [t, 1, r / 2] each, from RotaryTable; r <= d, what is behind is left as it is.
        interleaved: pairs are neighbours.

    Returns:
        [t, heads, d], contiguous.
    """
    return _Rotate.apply(x, *table, interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin, ctx.interleaved), None, None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rotate` without gradients: x [..., d], cosines and sines that broadcast to [..., r / 2]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
    (first, second), (low, high) = (_pairs(one[..., :turned], interleaved) for one in (x, out))
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second number of each pair, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
