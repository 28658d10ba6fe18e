"""All-to-all of visual tokens: from the rank that encoded a tile to the ranks that own its placeholder tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vita.layout import TileRoutes
from megatron_vita.parallel.collectives import exchange_tokens
from megatron_vita.parallel.groups import Groups


def exchange_features(features: Tensor, routes: TileRoutes, groups: Groups) -> tuple[Tensor, Tensor]:
    """Send every visual token to the rank that owns its placeholder token; differentiable.

    One all-to-all over the tensor x context group in the forward and one in the backward. Every rank of the group must
    join both, with or without tiles. Without sequence parallelism all tensor-parallel ranks own a copy of each token
    and the *complete* gradient of it: a visual token is sent to all of them, and its gradient is taken from one only,
    that of the encoding rank's own tensor rank.

    Args:
        features: [local tiles * tokens_per_tile, h], the visual tokens of `routes.tiles_of(groups.group_rank)`.
        routes: the same on every rank of the group.
        groups: coordinates and process groups of this rank.

    Returns:
        received visual tokens [r, h], and int64 [r], the local index of each (after the sequence-parallel split).
    """
    rank = groups.group_rank
    local_index, received = routes.receive(rank)
    index = torch.from_numpy(local_index).to(features.device)
    send_index, sent = routes.send(rank)
    if routes.group_size == 1 and len(send_index) == len(features):
        return features, index
    selected = torch.from_numpy(send_index).to(features.device)
    if routes.group_size == 1:
        return features.index_select(0, selected), index
    replicated = routes.layout.sp == 1
    return _Exchange.apply(features, selected, tuple(sent), tuple(received), groups, replicated), index


class _Exchange(torch.autograd.Function):
    """All-to-all of visual tokens; the backward is the reverse all-to-all.

    `replicated`: tokens are replicated over the tensor-parallel ranks, so the backward keeps one copy of each gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        selected: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        groups: Groups,
        replicated: bool,
    ) -> Tensor:
        ctx.settings = features.shape, sent, received, groups, replicated
        ctx.save_for_backward(selected)
        return _all_to_all(features.index_select(0, selected), sent, received, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, sent, received, groups, replicated = ctx.settings
        (selected,) = ctx.saved_tensors
        if replicated and groups.tp_size > 1:
            same_tp_rank = np.arange(len(sent)) % groups.tp_size == groups.tp_rank
            grad = _select_ranks(grad, received, same_tp_rank)
            selected = _select_ranks(selected, sent, same_tp_rank)
            sent = tuple(np.where(same_tp_rank, sent, 0).tolist())
            received = tuple(np.where(same_tp_rank, received, 0).tolist())
        d_features = _all_to_all(grad, received, sent, groups)
        return grad.new_zeros(shape).index_add_(0, selected, d_features), None, None, None, None, None


def _select_ranks(values: Tensor, counts: tuple[int, ...], ranks: Any) -> Tensor:
    """The slices of `values` (`counts[r]` entries for group rank r) whose entry of the boolean mask `ranks` is True."""
    slices = values.split(list(counts))
    return torch.cat([one for one, kept in zip(slices, ranks, strict=True) if kept])


def _all_to_all(values: Tensor, sent: tuple[int, ...], received: tuple[int, ...], groups: Groups) -> Tensor:
    return exchange_tokens(values, sent, received, groups.collection.tp_cp)
