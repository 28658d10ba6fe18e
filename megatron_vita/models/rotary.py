"""Rotary angles, gathered by each token's own position."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Angles of rotary position embedding for tokens at any positions, in any order."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        # Published models compute this in float32; wider arithmetic would move their logits at far positions.
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.register_buffer("_inverse_frequency", 1.0 / (base**exponent), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [1, t] -> float32 [t, 1, 1, head_dim], both halves alike (rotate-half pairing)."""
        angles = positions.reshape(-1, 1).float() * self._inverse_frequency
        return torch.cat([angles, angles], dim=-1).view(-1, 1, 1, angles.shape[1] * 2)
