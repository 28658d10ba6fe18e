"""Tile features travel from the rank that encoded the tile to the ranks that own its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vita.layout import TileRoutes
from megatron_vita.parallel.collectives import exchange_rows
from megatron_vita.parallel.groups import Groups


def exchange_features(features: Tensor, routes: TileRoutes, groups: Groups) -> tuple[Tensor, Tensor]:
    """Send every feature row to the rank (or, without sequence parallelism, the tensor-parallel ranks) of its token.

    One all-to-all over the tensor x context group, joined by every rank of it, with tiles or without, forward and
    backward. Without sequence parallelism the tensor-parallel ranks hold copies of a token and of its *complete*
    gradient; the backward takes it once, from the copy whose tensor rank is the encoder's, which shares the work out.

    Args:
        features: [n_local * tokens_per_tile, h], the rows of `routes.tiles_of(group_rank)`.
        routes: the same on every rank of the group.
        groups: this rank's place.

    Returns:
        rows [n_received, h] and, int64 [n_received], the index of each among this rank's local tokens (after the
        sequence-parallel split).
    """
    rank = groups.group_rank
    place, received = routes.receive(rank)
    index = torch.from_numpy(place).to(features.device)
    if routes.group_size == 1:
        return features, index
    picked, sent = routes.send(rank)
    rows = torch.from_numpy(picked).to(features.device)
    once = routes.layout.sp == 1
    return _Exchange.apply(features, rows, tuple(sent), tuple(received), groups, once), index


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the backward is the reverse exchange."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        groups: Groups,
        once: bool,
    ) -> Tensor:
        ctx.settings = features.shape, sent, received, groups, once
        ctx.save_for_backward(rows)
        return _all_to_all(features.index_select(0, rows), sent, received, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, sent, received, groups, once = ctx.settings
        (rows,) = ctx.saved_tensors
        if once and groups.tp_size > 1:
            mine = np.arange(len(sent)) % groups.tp_size == groups.tp_rank
            grad = _keep(grad, received, mine)
            rows = _keep(rows, sent, mine)
            sent = tuple(np.where(mine, sent, 0).tolist())
            received = tuple(np.where(mine, received, 0).tolist())
        back = _all_to_all(grad, received, sent, groups)
        return grad.new_zeros(shape).index_add_(0, rows, back), None, None, None, None, None


def _keep(values: Tensor, counts: tuple[int, ...], ranks: Any) -> Tensor:
    """The pieces of `values` that belong to some of the ranks."""
    pieces = values.split(list(counts))
    return torch.cat([piece for piece, kept in zip(pieces, ranks, strict=True) if kept])


def _all_to_all(values: Tensor, sent: tuple[int, ...], received: tuple[int, ...], groups: Groups) -> Tensor:
    return exchange_rows(values, sent, received, groups.collection.tp_cp)
