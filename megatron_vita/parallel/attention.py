"""Attention over a row of documents, at any context-parallel size, as a megatron-core core-attention module.

A rank computes the diagonal blocks of its own tokens while the keys and values of others travel (parallel/exchange.py
says how, in each of Megatron's cp_comm_types), then the off-diagonal blocks of its queries against what arrived, and
merges them by their log-sum-exp in float32 (float64 for float64). The backward gives every block the log-sum-exp of the
whole row, which makes its share of the gradients exact, and sends the gradients of keys and values home.
Legend: t local tokens, s tokens of the row, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vita.parallel import block_kernels, exchange
from megatron_vita.parallel.context import PackedSeqContext
from megatron_vita.parallel.rotary import rotate
from megatron_vita.parallel.schedule import Schedule


class VitaCoreAttention(MegatronModule):
    """Causal attention within documents, driven by the PackedSeqContext that arrives as `packed_seq_params`."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        # megatron-core passes a type only where there is context parallelism.
        self.cp_comm_type = cp_comm_type or "all_gather"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: PackedSeqContext,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """query [t, 1, h, d], key and value [t, 1, g, d] -> [t, 1, h * d]."""
        row = packed_seq_params
        assert row.layout is not None, "attention needs the row's layout"
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if row.rotary is not None:
            q, k = rotate(q, row.rotary), rotate(k, row.rotary)
        if row.cache is not None:
            out = _cached_attention(q, k, v, row, self.layer_number, self.scale)
        else:
            out = document_attention(q, k, v, row.schedule(q.device, self.cp_comm_type), self.cp_group, self.scale)
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to store."""
        return {}


class TowerCoreAttention(MegatronModule):
    """Attention of every patch of a tile to every other: no documents, no mask, no context parallelism."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, /, **_: Any) -> Tensor:
        """[patches, tiles, heads, d] three times -> [patches, tiles, heads * d]."""
        q, k, v = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to store."""
        return {}


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, cp_group: dist.ProcessGroup | None, scale: float
) -> Tensor:
    """Causal attention within documents over this rank's queries.

    Args:
        q: [t, h, d].
        k: [t, g, d].
        v: [t, g, d].
        schedule: this rank's blocks; it says how keys and values, or heads, travel.
        cp_group: the ranks that share the row; none: this one alone.
        scale: factor on the scores.

    Returns:
        [t, h, d].
    """
    if schedule.comm_type != "a2a":
        return _DocumentAttention.apply(q, k, v, schedule, cp_group, scale)
    assert cp_group is not None
    per_rank = [x.unflatten(1, (cp_group.size(), -1)) for x in (q, k, v)]
    row = exchange.scatter_heads(torch.cat(per_rank, dim=2), schedule, cp_group)
    heads = row.split([x.shape[2] for x in per_rank], dim=1)
    out = _DocumentAttention.apply(*heads, schedule, None, scale)
    return exchange.gather_heads(out, schedule, cp_group).flatten(1, 2)


class _DocumentAttention(torch.autograd.Function):
    """Forward and backward over a block schedule."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None, scale: float
    ) -> Tensor:
        keys = _start(k, v, schedule, group)  # travels while the diagonal blocks are computed
        diagonal = schedule.diagonal
        out, lse = block_kernels.forward(
            diagonal.partition(q), diagonal.partition(k), diagonal.partition(v), diagonal.blocks, scale
        )
        out, lse = diagonal.collect(out), diagonal.collect(lse)
        if keys is not None:
            out = out.to(lse.dtype)
            for (row_k, row_v), step in zip(keys.steps(), schedule.steps, strict=True):
                for full in step:
                    inputs = full.queries.of(q), full.keys.of(row_k), full.keys.of(row_v)
                    more = block_kernels.forward(*inputs, blocks=full.blocks, scale=scale)
                    merged = block_kernels.merge(full.queries.of(out), full.queries.of(lse), *more)
                    for target, values in zip((out, lse), merged, strict=True):
                        full.queries.put(target, values)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        schedule, group, scale = ctx.settings
        keys = _start(k, v, schedule, group)
        diagonal = schedule.diagonal
        own = diagonal.partition(grad)
        if diagonal.padding is not None:
            own.index_fill_(0, diagonal.padding, 0)  # `partition` made a copy: padding sends no gradient
        mine = (
            diagonal.partition(q),
            diagonal.partition(k),
            diagonal.partition(v),
            diagonal.partition(out),
            diagonal.partition(lse),
        )
        shares = block_kernels.backward(own, *mine, blocks=diagonal.blocks, scale=scale)
        dq, dk, dv = (diagonal.collect(share) for share in shares)
        if keys is not None:
            dq = dq.to(lse.dtype)
            for (row_k, row_v), step in zip(keys.steps(), schedule.steps, strict=True):
                share = torch.zeros(len(row_k), 2, *k.shape[1:], dtype=lse.dtype, device=k.device)
                for full in step:
                    of = full.queries.of
                    inputs = of(grad), of(q), full.keys.of(row_k), full.keys.of(row_v), of(out), of(lse)
                    more = block_kernels.backward(*inputs, blocks=full.blocks, scale=scale)
                    full.queries.add(dq, more[0])
                    for target, values in zip(share.unbind(1), more[1:], strict=True):
                        full.keys.add(target, values)
                keys.accumulate_grad(share)
            dk, dv = (one + more for one, more in zip((dk, dv), keys.finalize_grad().unbind(1), strict=True))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _start(k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None) -> exchange.KVExchange | None:
    """Every rank of the group joins, also one that needs no keys of others: they need its own."""
    if not schedule.steps:
        return None
    assert group is not None
    return exchange.start(k, v, schedule, group)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, row: PackedSeqContext, layer: int, scale: float) -> Tensor:
    """Attention of new tokens to the cached ones of their sequence and, causally, among themselves."""
    assert row.cache is not None
    plan = row.decoding(q.device)
    keys, values = row.cache.append(layer, k, v, plan)
    if plan.prefill:
        return document_attention(q, k, v, row.schedule(q.device), None, scale)
    sequences, longest, _ = plan.visible.shape
    padded = q.new_zeros(sequences * longest, *q.shape[1:]).index_copy_(0, plan.queries, q[: plan.known])
    out = F.scaled_dot_product_attention(
        padded.unflatten(0, (sequences, longest)).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=plan.visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    found = out.transpose(1, 2).flatten(0, 1).index_select(0, plan.queries)
    if plan.known == len(q):
        return found
    return torch.cat([found, torch.zeros_like(q[plan.known :])])  # documents beyond the sequences are padding
