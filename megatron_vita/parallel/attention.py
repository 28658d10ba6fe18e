"""Attention over a row of documents, at any context-parallel size, as a megatron-core core-attention module.

Every rank gathers the keys and values of the row (key/value heads unexpanded) and computes the blocks of its own
queries; the backward returns the gradients of keys and values to their owners by reduce-scatter. Blocks are merged by
their log-sum-exp in float32. Legend: t local tokens, s tokens of the row, h query heads, g key/value heads, d head
size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vita.parallel import block_kernels
from megatron_vita.parallel.context import RowContext
from megatron_vita.parallel.rotary import rotate
from megatron_vita.parallel.schedule import FullBlocks, Schedule


class VitaCoreAttention(MegatronModule):
    """Causal attention within documents, driven by the RowContext that arrives as `packed_seq_params`."""

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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: RowContext,
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
            out = document_attention(q, k, v, row.schedule(q.device), self.cp_group, self.scale)
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
        schedule: this rank's blocks.
        cp_group: the ranks that share the row; none: this one alone.
        scale: factor on the scores.

    Returns:
        [t, h, d].
    """
    return _DocumentAttention.apply(q, k, v, schedule, cp_group, scale)


class _DocumentAttention(torch.autograd.Function):
    """Forward and backward over a block schedule."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None, scale: float
    ) -> Tensor:
        causal = schedule.causal
        dealt = [causal.deal(q), *(block_kernels.expand(causal.deal(x), q) for x in (k, v))]
        results = [
            block_kernels.forward(*blocks, causal=True, scale=scale) for blocks in _batches(causal.batches, *dealt)
        ]
        out, lse = (causal.collect(_join(parts)) for parts in zip(*results, strict=True))
        if schedule.from_ranks is not None:  # also where this rank needs no keys of others: they need its own
            row_k, row_v = _gather_row(k, v, schedule, group)
            wide = out.to(lse.dtype)
            for batch in schedule.full:
                blocks = _full_inputs(batch, q, row_k, row_v)
                more, more_lse = block_kernels.forward(*blocks, causal=False, scale=scale)
                old = batch.queries.of(wide), batch.queries.of(lse)
                merged, merged_lse = block_kernels.merge(*old, _rows(more).to(lse.dtype), _rows(more_lse))
                batch.queries.put(wide, merged)
                batch.queries.put(lse, merged_lse)
            out = wide.to(q.dtype)
        ctx.save_for_backward(*dealt, out, lse, *((q, k, v) if schedule.from_ranks is not None else (None,) * 3))
        ctx.settings = schedule, group, scale, k.shape[1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *dealt, out, lse, q, k, v = ctx.saved_tensors
        schedule, group, scale, heads = ctx.settings
        causal = schedule.causal
        own = causal.deal(grad)
        if causal.padding is not None:
            own.index_fill_(0, causal.padding, 0)  # `deal` made a copy: padding sends no gradient
        batches = _batches(causal.batches, own, *dealt, causal.deal(out), causal.deal(lse))
        shares = [block_kernels.backward(*blocks, causal=True, scale=scale) for blocks in batches]
        dq, dk, dv = (_join(parts) for parts in zip(*shares, strict=True))
        dq = causal.collect(dq)
        dk, dv = (causal.collect(block_kernels.reduce(one, heads)) for one in (dk, dv))
        if schedule.from_ranks is not None:
            wide = torch.promote_types(dq.dtype, torch.float32)
            dq = dq.to(wide)
            row_grad = dk.new_zeros(len(schedule.from_ranks), 2, *dk.shape[1:], dtype=wide)
            row_k, row_v = _gather_row(k, v, schedule, group)
            for batch in schedule.full:
                d_out, o, o_lse = (_blocks(batch.queries.of(x), batch.blocks) for x in (grad, out, lse))
                in_q, in_k, in_v = _full_inputs(batch, q, row_k, row_v)
                more = block_kernels.backward(d_out, in_q, in_k, in_v, o, o_lse, causal=False, scale=scale)
                share_q, share_k, share_v = (_rows(one) for one in more)
                batch.queries.add(dq, share_q.to(wide))
                share = torch.stack([block_kernels.reduce(one, heads) for one in (share_k, share_v)], dim=1)
                batch.keys.add(row_grad, share.to(wide))
            from_others = _scatter_row(row_grad, schedule, group)
            dk, dv = dk + from_others[:, 0], dv + from_others[:, 1]
        dtype = grad.dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None


def _batches(shapes: Sequence[tuple[int, int]], *dealt: Tensor) -> Iterator[list[Tensor]]:
    """The inputs of each kernel call, [blocks, heads, tokens, ...], as views."""
    start = 0
    for blocks, tokens in shapes:
        count = blocks * tokens
        yield [_blocks(rows.narrow(0, start, count), blocks) for rows in dealt]
        start += count


def _full_inputs(batch: FullBlocks, q: Tensor, row_k: Tensor, row_v: Tensor) -> list[Tensor]:
    keys = [block_kernels.expand(batch.keys.of(x), q) for x in (row_k, row_v)]
    return [_blocks(rows, batch.blocks) for rows in (batch.queries.of(q), *keys)]


def _blocks(rows: Tensor, blocks: int) -> Tensor:
    """[blocks * l, heads, ...] -> [blocks, heads, l, ...], without a copy."""
    return rows.unflatten(0, (blocks, -1)).transpose(1, 2)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """The results of several kernel calls, one after another, as rows."""
    rows = [_rows(part) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _rows(blocks: Tensor) -> Tensor:
    """[blocks, heads, l, ...] -> [blocks * l, heads, ...]."""
    return blocks.transpose(1, 2).flatten(0, 1)


def _gather_row(k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole row in row order, two [s, g, d], in one collective."""
    assert group is not None
    assert schedule.from_ranks is not None
    # torch.stack is contiguous whatever the strides of k and v: gloo permutes data in silence where they differ.
    mine = torch.stack([k, v], dim=1)
    everyone = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(everyone, mine, group=group)
    row = everyone.index_select(0, schedule.from_ranks)
    return row[:, 0], row[:, 1]


def _scatter_row(row_grad: Tensor, schedule: Schedule, group: dist.ProcessGroup | None) -> Tensor:
    """Sum [s, 2, g, d] over the group; each rank gets its own tokens, [t, 2, g, d]."""
    assert group is not None
    assert schedule.to_ranks is not None
    by_rank = row_grad.index_select(0, schedule.to_ranks)
    mine = by_rank.new_empty(schedule.tokens, *by_rank.shape[1:])
    dist.reduce_scatter_tensor(mine, by_rank, group=group)
    return mine


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, row: RowContext, layer: int, scale: float) -> Tensor:
    """Attention of new tokens to the cached ones of their sequence and, causally, among themselves."""
    assert row.cache is not None
    plan = row.decoding(q.device)
    keys, values = row.cache.append(layer, k, v, plan)
    if plan.prefill:
        return document_attention(q, k, v, row.schedule(q.device), None, scale)
    sequences, longest, _ = plan.visible.shape
    padded = q.new_zeros(sequences * longest, *q.shape[1:]).index_copy_(0, plan.queries, q[: plan.known])
    out = F.scaled_dot_product_attention(
        _blocks(padded, sequences),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=plan.visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    found = _rows(out).index_select(0, plan.queries)
    if plan.known == len(q):
        return found
    return torch.cat([found, torch.zeros_like(q[plan.known :])])  # documents beyond the sequences are padding
