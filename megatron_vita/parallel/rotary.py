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

from megatron_vita.config.model import LLAMA3_HIGH, LLAMA3_LENGTH, LLAMA3_LOW


def llama3_scaling(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's RoPE scaling (transformers: rope_type llama3).

    Frequencies with a wavelength above LLAMA3_LENGTH / LLAMA3_LOW tokens are divided by `factor`, those with a
    wavelength below LLAMA3_LENGTH / LLAMA3_HIGH are unchanged, those between are interpolated linearly.

    Args:
        frequencies: inverse frequencies, any shape.
        factor: rope_scaling.factor of the Hugging Face config.

    Returns:
        scaled inverse frequencies, the same shape.
    """
    waves = LLAMA3_LENGTH * frequencies / (2 * math.pi)  # periods in the original context length
    kept = ((waves - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


class RotaryTable(nn.Module):
    """Computes cosines and sines of position ids; has no parameters and no buffers."""

    def __init__(self, rotary_dim: int, base: float, scaling_factor: float | None = None) -> None:
        """Compute the inverse frequencies.

        Args:
            rotary_dim: r, even; the numbers of a head that are turned.
            base: rope_theta.
            scaling_factor: factor of Llama 3.1's scaling; None: no scaling.
        """
        super().__init__()
        # float32 as in the published models: float64 would change their logits at far positions.
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        # Not a buffer: megatron-core's Float16Module would cast it to bfloat16, which cannot tell far positions apart.
        frequency = 1.0 / (base**exponent)
        self._inverse_frequency = frequency if scaling_factor is None else llama3_scaling(frequency, scaling_factor)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position ids int64 [1, t] -> cosines and sines [t, 1, r / 2] each, computed in float32, cast to `dtype`."""
        self._inverse_frequency = self._inverse_frequency.to(positions.device)
        angles = positions.reshape(-1, 1, 1).float() * self._inverse_frequency
        return angles.cos().to(dtype), angles.sin().to(dtype)


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
        return _apply_rotation(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _apply_rotation(grad, cos, -sin, ctx.interleaved), None, None, None


def _apply_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
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
