"""Attention over a row of documents, at any context-parallel size, as a megatron-core core-attention module.

Every rank gathers the keys and values of the row (key/value heads unexpanded) and computes the blocks of its own
queries; the backward returns the gradients of keys and values to their owners by reduce-scatter. Blocks are merged by
their log-sum-exp in float32. Legend: t local tokens, s tokens of the row, h query heads, g key/value heads, d head
size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vita.errors import ConfigError
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel import block_kernels
from megatron_vita.parallel.context import KVCache, RowContext
from megatron_vita.parallel.schedule import BlockBatch, Schedule


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
        if row.cache is not None:
            out = _cached_attention(q, k, v, row.cache, self.layer_number, row.layout, row, self.scale)
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
        if _one_block(schedule):
            out, lse = block_kernels.forward(*(_blocks(x, 1) for x in (q, k, v)), causal=True, scale=scale)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.settings = schedule, group, scale
            return out.transpose(1, 2).squeeze(0)
        tokens, heads, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(tokens + 1, *q.shape[1:], dtype=wide if schedule.full else q.dtype)
        lse = q.new_empty(tokens + 1, heads, dtype=wide)
        for batch in schedule.causal:
            block, block_lse = _forward_batch(batch, q, k, v, causal=True, scale=scale)
            batch.write.put(out, block)
            batch.write.put(lse, block_lse)
        if schedule.full:
            all_k, all_v = _gather_row(k, v, schedule, group)
            for batch in schedule.full:
                block, block_lse = _forward_batch(batch, q, all_k, all_v, causal=False, scale=scale)
                merged = block_kernels.merge(batch.write.of(out), batch.write.of(lse), block.to(wide), block_lse)
                batch.write.put(out, merged[0])
                batch.write.put(lse, merged[1])
        elif schedule.from_ranks is not None:
            _gather_row(k, v, schedule, group)  # other ranks of the group need ours
        out, lse = out[:tokens].to(q.dtype), lse[:tokens]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        schedule, group, scale = ctx.settings
        if _one_block(schedule):
            blocks = (_blocks(x, 1) for x in (grad, q, k, v))
            dq, dk, dv = block_kernels.backward(*blocks, out, lse, causal=True, scale=scale)
            return (*(one.transpose(1, 2).squeeze(0) for one in (dq, dk, dv)), None, None, None)
        tokens = q.shape[0]
        wide = torch.promote_types(q.dtype, torch.float32) if schedule.full else q.dtype
        dq = q.new_empty(tokens + 1, *q.shape[1:], dtype=wide)
        dk = k.new_empty(tokens + 1, *k.shape[1:], dtype=wide)
        dv = torch.empty_like(dk)
        for batch in schedule.causal:
            shares = _backward_batch(batch, grad, q, k, v, out, lse, causal=True, scale=scale)
            for target, share in zip((dq, dk, dv), shares, strict=True):
                batch.write.put(target, share.to(wide))
        dq, dk, dv = dq[:tokens], dk[:tokens], dv[:tokens]
        if schedule.from_ranks is not None:
            all_k, all_v = _gather_row(k, v, schedule, group)
            row_grad = k.new_zeros(all_k.shape[0], 2, *k.shape[1:], dtype=torch.promote_types(k.dtype, torch.float32))
            for batch in schedule.full:
                share_q, share_k, share_v = _backward_batch(
                    batch, grad, q, all_k, all_v, out, lse, causal=False, scale=scale
                )
                batch.queries.add(dq, share_q.to(wide))
                batch.keys.add(row_grad, torch.stack([share_k, share_v], dim=1).to(row_grad.dtype))
            own = _scatter_row(row_grad, schedule, group)
            dk, dv = dk + own[:, 0], dv + own[:, 1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _one_block(schedule: Schedule) -> bool:
    """The row is one document and this rank owns it all: one fused call, no copies."""
    return schedule.from_ranks is None and len(schedule.causal) == 1 and schedule.causal[0].blocks == 1


def _blocks(rows: Tensor, blocks: int) -> Tensor:
    """[blocks * l, heads, d] -> [blocks, heads, l, d], without a copy."""
    return rows.view(blocks, -1, *rows.shape[1:]).transpose(1, 2)


def _rows(blocks: Tensor) -> Tensor:
    """[blocks, heads, l, ...] -> [blocks * l, heads, ...]."""
    return blocks.transpose(1, 2).flatten(0, 1)


def _forward_batch(
    batch: BlockBatch, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = block_kernels.forward(
        _blocks(batch.queries.of(q), batch.blocks),
        _blocks(batch.keys.of(k), batch.blocks),
        _blocks(batch.keys.of(v), batch.blocks),
        causal=causal,
        scale=scale,
    )
    return _rows(out), _rows(lse)


def _backward_batch(
    batch: BlockBatch,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    own = batch.queries.of(grad)
    if batch.padding is not None:
        own.index_fill_(0, batch.padding, 0)  # `of` gathered a copy: padding sends no gradient
    dq, dk, dv = block_kernels.backward(
        _blocks(own, batch.blocks),
        _blocks(batch.queries.of(q), batch.blocks),
        _blocks(batch.keys.of(k), batch.blocks),
        _blocks(batch.keys.of(v), batch.blocks),
        _blocks(batch.queries.of(out), batch.blocks),
        _blocks(batch.queries.of(lse), batch.blocks),
        causal=causal,
        scale=scale,
    )
    return _rows(dq), _rows(dk), _rows(dv)


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


def _cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int, layout: SequenceLayout, row: RowContext, scale: float
) -> Tensor:
    """Attention of new tokens to the cached ones of their sequence and, causally, among themselves."""
    if layout.cp > 1:
        raise ConfigError(
            f"generation with a cache runs at context_parallel_size 1, not {layout.cp}. Load the model with "
            "parallel.context_parallel_size=1."
        )
    if len(layout.documents) < len(cache):
        raise ConfigError(
            f"a row of {len(layout.documents)} documents for {len(cache)} cached sequences: document i continues "
            "sequence i, so give each sequence a document, or forget finished ones with KVCache.keep."
        )
    prefill = cache.empty
    keys, values = cache.append(layer, k, v, layout.documents)
    if prefill:
        return document_attention(q, k, v, row.schedule(q.device), None, scale)
    counts = layout.documents[: len(cache)]
    longest = max(counts)
    known = sum(counts)
    have = torch.tensor(cache.lengths, device=q.device)
    padded = q.new_zeros(len(counts), longest, *q.shape[1:])
    place = torch.cat([torch.arange(new, device=q.device) + one * longest for one, new in enumerate(counts)])
    padded.view(-1, *q.shape[1:]).index_copy_(0, place, q[:known])
    visible = (
        torch.arange(keys.shape[1], device=q.device)
        <= (have[:, None] + torch.arange(longest, device=q.device))[..., None]
    )
    out = F.scaled_dot_product_attention(
        padded.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=True,
    )
    found = out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, place)
    return torch.cat([found, torch.zeros_like(q[known:])])  # documents beyond the sequences are padding
