"""All-to-all of visual tokens: from the rank that encoded a tile to the ranks that own its placeholder tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vita.layout import TileRoutes
from megatron_vita.parallel.collectives import exchange_tokens
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.tables import gather_tables


@dataclass(frozen=True, slots=True)
class FeatureExchange:
    """One rank's side of the all-to-all of a packed sequence's visual tokens."""

    selected: Tensor
    """int64 [sum of sent], indices into the rank's own visual tokens, ordered by destination."""
    index: Tensor
    """int64 [sum of received], the local index of each received visual token (after the sequence-parallel split)."""
    sent: tuple[int, ...]
    """Visual tokens for each rank of the tensor x context group."""
    received: tuple[int, ...]
    """Visual tokens from each of them."""
    replicated: bool
    """Without sequence parallelism the tensor-parallel ranks own copies of a token: each gets the visual token."""


def host_exchange(routes: TileRoutes, group_rank: int) -> FeatureExchange:
    """The exchange of one group rank, with the index tensors on the CPU. No communication."""
    index, received = routes.receive(group_rank)
    selected, sent = routes.send(group_rank)
    indices = torch.from_numpy(selected), torch.from_numpy(index)
    return FeatureExchange(*indices, tuple(sent), tuple(received), routes.layout.sp == 1)


def build_exchange(routes: TileRoutes, group_rank: int, device: torch.device) -> FeatureExchange:
    """The exchange of one group rank, with the index tensors on the device. No communication."""
    return gather_tables(host_exchange(routes, group_rank)).to(device)


def exchange_features(features: Tensor, exchange: FeatureExchange, groups: Groups) -> Tensor:
    """Send every visual token to the rank that owns its placeholder token; differentiable.

    One all-to-all over the tensor x context group in the forward and one in the backward. Every rank of the group must
    join both, with or without tiles. Without sequence parallelism all tensor-parallel ranks own a copy of each token
    and the *complete* gradient of it: a visual token is sent to all of them, and its gradient is taken from one only,
    that of the encoding rank's own tensor rank.

    Args:
        features: [local tiles * tokens_per_tile, h], the visual tokens of this rank's tiles.
        exchange: of this rank (`groups.group_rank`).
        groups: coordinates and process groups of this rank.

    Returns:
        received visual tokens [r, h], in the order of `exchange.index`.
    """
    if len(exchange.sent) > 1:
        return _Exchange.apply(features, exchange, groups)
    return features if len(exchange.selected) == len(features) else features.index_select(0, exchange.selected)


class _Exchange(torch.autograd.Function):
    """All-to-all of visual tokens; the backward is the reverse all-to-all, of one copy of each gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, exchange: FeatureExchange, groups: Groups) -> Tensor:
        ctx.settings = features.shape, exchange, groups
        return _all_to_all(features.index_select(0, exchange.selected), exchange.sent, exchange.received, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, exchange, groups = ctx.settings
        selected, sent, received = exchange.selected, exchange.sent, exchange.received
        if exchange.replicated and groups.tp_size > 1:
            same_tp_rank = np.arange(len(sent)) % groups.tp_size == groups.tp_rank
            grad = _select_ranks(grad, received, same_tp_rank)
            selected = _select_ranks(selected, sent, same_tp_rank)
            sent = tuple(np.where(same_tp_rank, sent, 0).tolist())
            received = tuple(np.where(same_tp_rank, received, 0).tolist())
        d_features = _all_to_all(grad, received, sent, groups)
        return grad.new_zeros(shape).index_add_(0, selected, d_features), None, None


def _select_ranks(values: Tensor, counts: tuple[int, ...], ranks: Any) -> Tensor:
    """The slices of `values` (`counts[r]` entries for group rank r) whose entry of the boolean mask `ranks` is True."""
    slices = values.split(list(counts))
    return torch.cat([one for one, kept in zip(slices, ranks, strict=True) if kept])


def _all_to_all(values: Tensor, sent: tuple[int, ...], received: tuple[int, ...], groups: Groups) -> Tensor:
    return exchange_tokens(values, sent, received, groups.collection.tp_cp)
