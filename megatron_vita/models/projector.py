"""Projector from vision tower to decoder: pixel shuffle, then LayerNorm, linear, GELU, linear."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from megatron_vita.config import ModelConfig


def pixel_shuffle(patches: Tensor) -> Tensor:
    """Concatenate the channels of each 2 x 2 cell of patches (space-to-depth).

    Y[A, B, m] = X[2A + m // 2C, 2B + (m mod 2C) // C, m mod C]: the channel order is top-left, top-right, bottom-left,
    bottom-right. Patches and output tokens are in row-major order.

    Args:
        patches: [n, side * side, C], side even.

    Returns:
        [n, side * side / 4, 4 * C].
    """
    tiles, count, channels = patches.shape
    side = round(count**0.5)
    cells = patches.view(tiles, side // 2, 2, side // 2, 2, channels)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(tiles, count // 4, 4 * channels)


class Projector(nn.Module):
    """LayerNorm, linear, GELU, linear; replicated on every rank that holds a vision tower.

    The LayerNorm has an epsilon of its own, model.projector.norm_epsilon.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.vision is not None, "a projector needs a tower"
        width, bias = 4 * model.vision.hidden_size, model.projector.bias
        self.pre_proj_layernorm = nn.LayerNorm(width, eps=model.projector.norm_epsilon, dtype=dtype)
        self.encoder = nn.Sequential(
            OrderedDict(
                linear_fc1=nn.Linear(width, model.projector_width, bias=bias, dtype=dtype),
                activation=nn.GELU(),
                linear_fc2=nn.Linear(model.projector_width, model.hidden_size, bias=bias, dtype=dtype),
            )
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Patch states [n, patches, tower width] -> visual tokens [n, patches / 4, decoder width]."""
        tokens: Tensor = self.encoder(self.pre_proj_layernorm(pixel_shuffle(patches)))
        return tokens
