"""Context-parallel attention over packed documents: causal within each document.

Each rank computes the diagonal blocks of its own tokens while keys and values are communicated (parallel/exchange.py,
for each of Megatron's cp_comm_types), then the off-diagonal blocks of its queries against the received keys, and merges
the outputs by their log-sum-exp in float32 (float64 for float64 inputs). The backward recommunicates keys and values,
passes to every block the log-sum-exp over all keys of a query, so that the block's gradient contribution is exact, and
reduces the gradients of keys and values to the ranks that own them.

Legend: s tokens of the packed sequence, t = s/cp tokens of this rank, h query heads, g key/value heads of this
tensor-parallel rank, d head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel import block_kernels, exchange
from megatron_vita.parallel.schedule import DiagonalBlocks, Schedule


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, cp_group: dist.ProcessGroup | None, scale: float
) -> Tensor:
    """Causal attention within documents for this rank's queries; differentiable. All ranks of `cp_group` call it.

    Args:
        q: [t, h, d], rotary embedding applied.
        k: [t, g, d], rotary embedding applied; under `a2a` g is a multiple of the group's size.
        v: [t, g, d].
        schedule: this rank's blocks; `schedule.comm_type` selects the communication.
        cp_group: the context-parallel ranks of the packed sequence; None with one rank.
        scale: softmax scale.

    Returns:
        [t, h, d], the dtype of q.
    """
    if schedule.comm_type != "a2a":
        # The rotary embedding copied q and k. v is still a view of the projection of all three, and saved for the
        # backward it would keep their memory: 1.2 GB over 48 layers of 16,384 tokens.
        return _DocumentAttention.apply(q, k, v.contiguous(), schedule, cp_group, scale)
    assert cp_group is not None
    per_rank = [x.unflatten(1, (cp_group.size(), -1)) for x in (q, k, v)]
    qkv = exchange.scatter_heads(torch.cat(per_rank, dim=2), schedule, cp_group)
    heads = qkv.split([x.shape[2] for x in per_rank], dim=1)
    out = _DocumentAttention.apply(*heads, schedule, None, scale)
    return exchange.gather_heads(out, schedule, cp_group).flatten(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward of `document_attention` under `all_gather` and `p2p`, with the log-sum-exp.

    Returns:
        output [t, h, d] in the dtype of q, or of the log-sum-exp where blocks were merged; log-sum-exp [t, h], float32
        or wider.
    """
    kv_exchange = _start_exchange(k, v, schedule, group)  # overlaps with the diagonal blocks
    diagonal = schedule.diagonal
    out, lse = block_kernels.forward(
        diagonal.partition(q), diagonal.partition(k), diagonal.partition(v), diagonal.blocks, scale
    )
    out, lse = diagonal.collect(out), diagonal.collect(lse)
    if kv_exchange is not None:
        out = out.to(lse.dtype)
        for step_kv, blocks_of_step in zip(kv_exchange.steps(), schedule.steps, strict=True):
            for off in blocks_of_step:
                off_k, off_v = off.keys.gather(step_kv).unbind(1)
                off_out, off_lse = block_kernels.forward(off.queries.gather(q), off_k, off_v, off.blocks, scale)
                some = off.queries.gather(out), off.queries.gather(lse)
                block_kernels.merge_(*some, off_out, off_lse)
                if off.queries.index is not None:  # copies, not views
                    for target, values in zip((out, lse), some, strict=True):
                        off.queries.scatter_(target, values)
    return out, lse


class _DocumentAttention(torch.autograd.Function):
    """Attention over a block schedule; saves q, k, v, output and log-sum-exp of this rank's tokens only."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None, scale: float
    ) -> Tensor:
        out, lse = attend(q, k, v, schedule, group, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        schedule, group, scale = ctx.settings
        kv_exchange = _start_exchange(k, v, schedule, group)
        own = partial(_diagonal_backward, grad, q, k, v, out, lse, schedule.diagonal, scale)
        if kv_exchange is None:
            return *own(), None, None, None
        # The diagonal blocks need no communication: they are computed while the last gradients go round the ring, or
        # while all keys are gathered.
        ring = schedule.comm_type == "p2p"
        grads = None if ring else own()
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        for step_kv, blocks_of_step in zip(kv_exchange.steps(), schedule.steps, strict=True):
            d_kv = torch.zeros_like(step_kv, dtype=lse.dtype)
            for off in blocks_of_step:
                off_grad, off_q, off_out, off_lse = (off.queries.gather(x) for x in (grad, q, out, lse))
                off_k, off_v = off.keys.gather(step_kv).unbind(1)
                off_grads = block_kernels.backward(off_grad, off_q, off_k, off_v, off_out, off_lse, off.blocks, scale)
                off.queries.scatter_add_(dq, off_grads[0])
                for target, values in zip(d_kv.unbind(1), off_grads[1:], strict=True):
                    off.keys.scatter_add_(target, values)
            kv_exchange.accumulate_grad(d_kv)
        own_dq, own_dk, own_dv = grads or own()
        dk, dv = (x + off for x, off in zip((own_dk, own_dv), kv_exchange.finalize_grad().unbind(1), strict=True))
        return dq.add_(own_dq).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _diagonal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, diagonal: DiagonalBlocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contribution of the diagonal blocks to the gradients of q [t, h, d], k and v [t, g, d]."""
    d_out = diagonal.partition(grad)
    if diagonal.padding is not None:
        d_out.index_fill_(0, diagonal.padding, 0)  # in place: `partition` made a copy wherever there is padding
    q, k, v, out, lse = (diagonal.partition(x) for x in (q, k, v, out, lse))
    dq, dk, dv = block_kernels.backward(d_out, q, k, v, out, lse, diagonal.blocks, scale)
    return diagonal.collect(dq), diagonal.collect(dk), diagonal.collect(dv)


def _start_exchange(
    k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None
) -> exchange.KVExchange | None:
    """Start communicating keys and values; None where the schedule has no steps.

    Every rank of the group calls it, also a rank without off-diagonal blocks: other ranks need its keys.
    """
    if not schedule.steps:
        return None
    assert group is not None
    return exchange.start(k, v, schedule, group)
