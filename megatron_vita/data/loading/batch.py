"""A Batch: what one rank needs for one micro-batch, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vita.layout import SequenceLayout, TileRoutes


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, sliced for one rank. CPU tensors; s: packed sequence length, cp: context-parallel size.

    The tensors hold the context-parallel rank's tokens (`layout.local_positions(cp_rank)`); the sequence-parallel split
    happens inside the model, where the embedding scatters.
    """

    tokens: torch.Tensor
    """int64 `[1, s/cp]`; placeholders included."""
    labels: torch.Tensor
    """int64 `[1, s/cp]`; already shifted by one; -100 where there is no loss."""
    positions: torch.Tensor
    """int64 `[1, s/cp]`; position inside the document: the sample with reset, the pack without."""
    layout: SequenceLayout
    """Which rank owns which token of the packed sequence."""
    tiles: torch.Tensor
    """uint8 `[n_local, 3, S, S]`; the tiles this rank encodes, `routes.tiles_of(group_rank)`, in that order.
    Empty on ranks that hold no tower (later pipeline stages)."""
    tile_ids: torch.Tensor
    """int64 `[n_local]`; numbers of those tiles in the shards' tiles file."""
    routes: TileRoutes
    """Which visual token goes to which position; the same on every rank of the tensor x context group."""
    sample_ids: tuple[int, ...]
    """Samples of the packed sequence, by their number in the shards' samples file."""
    prepared: Any = None
    """What the loader's `prepare` made of the batch as it is; None: nothing, or its labels have changed since."""

    @property
    def labelled(self) -> torch.Tensor:
        """int64 `[n]`; indices of the tokens with a label among the s/cp, ascending."""
        return torch.from_numpy(np.flatnonzero(self.labels.numpy() >= 0))
