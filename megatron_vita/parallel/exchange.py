"""Communication of context-parallel attention, for each of Megatron's cp_comm_types.

* `all_gather`: all-gather of keys and values before attention; reduce-scatter of their gradients.
* `p2p`: ring send/recv of keys and values, one hop per step, overlapped with the attention blocks of the previous step.
  In the backward the gradient accumulators follow their keys around the ring and end at the rank that owns them: each
  hop is overlapped with the blocks of the next step, the last one with the diagonal blocks.
* `a2a` (Ulysses): all-to-all that scatters heads and gathers tokens, before and after attention.

Keys and values are communicated with their g heads, before GQA expansion, in the dtype of the model; their gradients in
float32 or wider. Legend: n ranks, s tokens of the packed sequence, t = s/n local tokens, h query heads, g key/value
heads, d head size, e bytes per element of the model's dtype, w bytes per element of the gradients. Bytes received per
rank and layer:

    cp_comm_type  forward                        backward
    all_gather    (n - 1) t 2 g d e              (n - 1) t 2 g d (e + w)
    p2p           (n - 1) t 2 g d e              (n - 1) t 2 g d (e + w)
    a2a           (n - 1) / n t (2 h + 2 g) d e  the same
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import (
    AsyncTensor,
    exchange_tokens,
    gather_tokens,
    reduce_scatter_tokens,
    ring_send_recv,
)
from megatron_vita.parallel.schedule import Schedule


class KVExchange(Protocol):
    """Communication of keys and values in steps, and of their gradients in the backward.

    Use: create it with `start`, iterate over `steps`; in the backward call `accumulate_grad` once in each step, then
    `finalize_grad`. All ranks of the group do so in the same order.
    """

    def steps(self) -> Iterator[Tensor]:
        """Keys and values of each step of the schedule, [keys, 2, g, d]; waits for those of the next step."""

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Add the gradient [keys, 2, g, d] of the current step's keys and values; the tensor may be modified."""

    def finalize_grad(self) -> Tensor:
        """Gradient of this rank's keys and values, summed over the group, [t, 2, g, d]. Call it after the last step."""


def start(k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> KVExchange:
    """Start communicating keys and values [t, g, d] without waiting; collective over `group`."""
    # torch.stack is contiguous whatever the strides of k and v.
    local_kv = torch.stack([k, v], dim=1)
    return RingKV(local_kv, group) if schedule.comm_type == "p2p" else GatheredKV(local_kv, schedule, group)


class GatheredKV:
    """KVExchange by all-gather and reduce-scatter: one step, with the keys of the whole packed sequence."""

    def __init__(self, local_kv: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> None:
        """Start the all-gather of local_kv [t, 2, g, d]."""
        self._schedule = schedule
        self._group = group
        self._gathered = gather_tokens(local_kv, group)

    def steps(self) -> Iterator[Tensor]:
        """All keys and values by global index, [s, 2, g, d]."""
        yield self._schedule.to_sequence_order(self._gathered.wait())

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Reduce-scatter [s, 2, g, d] over the group."""
        self._grad = reduce_scatter_tokens(self._schedule.to_rank_order(gradient), self._group)

    def finalize_grad(self) -> Tensor:
        """Gradient of this rank's keys and values, [t, 2, g, d]."""
        return self._grad


class RingKV:
    """KVExchange by ring send/recv: n steps, the first with this rank's keys, step i with those of rank - i."""

    def __init__(self, local_kv: Tensor, group: dist.ProcessGroup) -> None:
        """Start sending local_kv [t, 2, g, d] to the next rank."""
        self._local_kv = local_kv
        self._group = group
        self._next_kv = ring_send_recv(local_kv, group, tag=0)
        self._local_grad: Tensor | None = None
        self._received_grad: AsyncTensor | None = None

    def steps(self) -> Iterator[Tensor]:
        """Keys and values of one rank, [t, 2, g, d]; the next hop is in flight meanwhile."""
        yield self._local_kv
        for hops_left in reversed(range(self._group.size() - 1)):
            kv = self._next_kv.wait()
            if hops_left:
                self._next_kv = ring_send_recv(kv, self._group, tag=0)
            yield kv

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Add the accumulator received for the current step's keys and send the sum to the next rank.

        The first step's gradient, of this rank's own keys, stays here.
        """
        if self._local_grad is None:
            self._local_grad = gradient
            return
        if self._received_grad is not None:
            gradient += self._received_grad.wait()
        self._received_grad = ring_send_recv(gradient, self._group, tag=1)

    def finalize_grad(self) -> Tensor:
        """Sum of the local contribution and the accumulator that went round the ring, [t, 2, g, d]."""
        assert self._local_grad is not None
        assert self._received_grad is not None
        return self._local_grad + self._received_grad.wait()


def scatter_heads(local: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    """All-to-all from token-parallel to head-parallel; differentiable.

    Args:
        local: [t, n, heads, d], this rank's tokens; dimension 1 is the rank that gets the heads.
        schedule: of this rank, with comm_type `a2a`.
        group: the n context-parallel ranks.

    Returns:
        [s, heads, d], all tokens by global index, this rank's heads.
    """
    return _ScatterHeads.apply(local, schedule, group)


def gather_heads(by_head: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    """The inverse all-to-all of `scatter_heads`: [s, heads, d] -> [t, n, heads, d]; differentiable."""
    return _GatherHeads.apply(by_head, schedule, group)


def _to_head_parallel(local: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    each = [schedule.tokens] * group.size()
    return schedule.to_sequence_order(exchange_tokens(local.transpose(0, 1).flatten(0, 1), each, each, group))


def _to_token_parallel(by_head: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
    each = [schedule.tokens] * group.size()
    received = exchange_tokens(schedule.to_rank_order(by_head), each, each, group)
    return received.unflatten(0, (group.size(), -1)).transpose(0, 1)


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
        ctx.settings = schedule, group
        return _to_head_parallel(local, schedule, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_token_parallel(grad, *ctx.settings), None, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_head: Tensor, schedule: Schedule, group: dist.ProcessGroup) -> Tensor:
        ctx.settings = schedule, group
        return _to_token_parallel(by_head, schedule, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_head_parallel(grad, *ctx.settings), None, None
