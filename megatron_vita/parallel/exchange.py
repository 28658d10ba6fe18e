"""How keys and values, or heads, travel in context-parallel attention: the three kinds of Megatron's cp_comm_type.

* `all_gather`: every rank gathers the row's keys and values; their gradients come home by reduce-scatter.
* `p2p`: the ranks' keys and values go round a ring, one hop a step, each hop under way while the blocks of the step
  before are computed; their gradients go round behind them, one hop further, home.
* `a2a` (Ulysses): heads are scattered and the row is gathered; then every rank has the whole row for its heads.

Only key/value heads travel, never expanded ones. Gradients travel in float32 or wider. With t local tokens, g key/value
heads, h query heads, d head size, n ranks and e bytes an element (w of float32, or wider), a rank receives

    kind         forward                        backward
    all_gather   (n - 1) t 2 g d e              (n - 1) t 2 g d (e + w)
    p2p          (n - 1) t 2 g d e              (n - 1) t 2 g d (e + w)
    a2a          (n - 1) / n t (2 h + 2 g) d e  the same

bytes. Legend: s tokens of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import (
    AsyncTensor,
    exchange_rows,
    gather_rows,
    reduce_scatter_rows,
    ring_send_recv,
)
from megatron_vita.parallel.schedule import Schedule


class KVExchange(Protocol):
    """Keys and values of the ranks, in the steps of a schedule; started before a rank computes its diagonal blocks."""

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [rows, g, d] that the blocks of each step read."""

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Take the gradient [rows, 2, g, d] of the step at hand. The tensor is the exchange's from now on."""

    def finalize_grad(self) -> Tensor:
        """After the last step: what all ranks gave for this rank's keys and values, [t, 2, g, d]."""


def start(k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> KVExchange:
    """Begin to exchange keys and values [t, g, d]; every rank of the group calls it, forward and backward."""
    # torch.stack is contiguous whatever the strides of k and v.
    mine = torch.stack([k, v], dim=1)
    return RingKV(mine, group) if schedule.comm_type == "p2p" else GatheredKV(mine, schedule, group)


class GatheredKV:
    """One step: the whole row, in row order."""

    def __init__(self, mine: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> None:
        self._schedule = schedule
        self._group = group
        self._coming = gather_rows(mine, group)

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The row's keys and values, [s, g, d]."""
        row = self._schedule.to_row_order(self._coming.wait())
        yield row[:, 0], row[:, 1]

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Sum over the group; each rank gets its own tokens."""
        self._home = reduce_scatter_rows(self._schedule.to_rank_order(gradient), self._group)

    def finalize_grad(self) -> Tensor:
        """Of this rank's keys and values."""
        return self._home


class RingKV:
    """As many steps as ranks: this rank's own, then those of the rank before, and so on."""

    def __init__(self, mine: Tensor, group: dist.ProcessGroup) -> None:
        self._mine = mine
        self._group = group
        self._coming = ring_send_recv(mine, group, tag=0)
        self._own: Tensor | None = None
        self._gradient: AsyncTensor | None = None

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of one rank, [t, g, d]; the next ones travel meanwhile."""
        yield self._mine[:, 0], self._mine[:, 1]
        for left in reversed(range(self._group.size() - 1)):
            held = self._coming.wait()
            if left:
                self._coming = ring_send_recv(held, self._group, tag=0)
            yield held[:, 0], held[:, 1]

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Add what the ranks before found for these keys, and send the sum on."""
        if self._own is None:
            self._own = gradient
            return
        if self._gradient is not None:
            gradient += self._gradient.wait()
        self._gradient = ring_send_recv(gradient, self._group, tag=1)

    def finalize_grad(self) -> Tensor:
        """What came home, and this rank's own share."""
        assert self._own is not None
        assert self._gradient is not None
        return self._own + self._gradient.wait()


def scatter_heads(packed: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    """[t, ranks, heads, d], the heads of each rank -> [s, heads, d]: this rank's heads of the whole row."""
    return _ScatterHeads.apply(packed, schedule, group)


def gather_heads(row: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    """The way back: [s, heads, d] -> [t, ranks, heads, d]."""
    return _GatherHeads.apply(row, schedule, group)


def _to_row(packed: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    each = [schedule.tokens] * group.size()
    return schedule.to_row_order(exchange_rows(packed.transpose(0, 1).flatten(0, 1), each, each, group))


def _to_local(row: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    each = [schedule.tokens] * group.size()
    back = exchange_rows(schedule.to_rank_order(row), each, each, group)
    return back.unflatten(0, (group.size(), -1)).transpose(0, 1)


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
        ctx.settings = schedule, group
        return _to_row(packed, schedule, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_local(grad, *ctx.settings), None, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
        ctx.settings = schedule, group
        return _to_local(row, schedule, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_row(grad, *ctx.settings), None, None
