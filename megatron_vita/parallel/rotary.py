"""Rotary position embedding, gathered by each token's own position.

Applied inside our core attention rather than by megatron-core: the cosines are computed once per row instead of in
every layer, and a rotation's backward is one more rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Cosines and sines for tokens at any positions, in any order."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        # Published models compute this in float32; wider arithmetic would move their logits at far positions.
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        # No buffer: megatron-core's Float16Module would make a bfloat16 one of it, and far positions fall together.
        self._inverse_frequency = 1.0 / (base**exponent)

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
