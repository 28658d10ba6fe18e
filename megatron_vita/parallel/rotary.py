"""Rotary position embedding, gathered by each token's own position.

Applied inside our core attention rather than by megatron-core: the cosines are computed once per row instead of in
every layer, and a rotation's backward is one more rotation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vita.config.model import LLAMA3_HIGH, LLAMA3_LENGTH, LLAMA3_LOW


def llama3_scaling(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's rotary scaling of inverse frequencies, any shape.

    A wave longer than LLAMA3_LENGTH / LLAMA3_LOW tokens turns `factor` times slower, one shorter than LLAMA3_LENGTH /
    LLAMA3_HIGH as before, one in between by a mixture of the two. (transformers: rope_type llama3.)
    """
    waves = LLAMA3_LENGTH * frequencies / (2 * math.pi)  # in the original context
    kept = ((waves - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


class RotaryTable(nn.Module):
    """Cosines and sines for tokens at any positions, in any order."""

    def __init__(self, head_dim: int, base: float, scaling_factor: float | None = None) -> None:
        """`scaling_factor`: of Llama 3.1's scaling; none: none."""
        super().__init__()
        # Published models compute this in float32; wider arithmetic would move their logits at far positions.
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        # No buffer: megatron-core's Float16Module would make a bfloat16 one of it, and far positions fall together.
        frequency = 1.0 / (base**exponent)
        self._inverse_frequency = frequency if scaling_factor is None else llama3_scaling(frequency, scaling_factor)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """int64 [1, t] -> cosines and sines [t, 1, head_dim / 2], computed in float32, in `dtype`."""
        self._inverse_frequency = self._inverse_frequency.to(positions.device)
        angles = positions.reshape(-1, 1, 1).float() * self._inverse_frequency
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its token's angle.

    Args:
        x: [t, heads, d].
        table: cosines and sines [t, 1, d / 2].
    """
    return _Rotate.apply(x, *table)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out
