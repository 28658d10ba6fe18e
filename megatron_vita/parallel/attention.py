"""Context-parallel attention over packed documents, as a megatron-core core-attention module.

Each rank computes the diagonal blocks of its own tokens while keys and values are communicated (parallel/exchange.py,
for each of Megatron's cp_comm_types), then the off-diagonal blocks of its queries against the received keys, and merges
the outputs by their log-sum-exp in float32 (float64 for float64 inputs). The backward recommunicates keys and values,
passes to every block the log-sum-exp over all keys of a query, so that the block's gradient contribution is exact, and
reduces the gradients of keys and values to the ranks that own them.

Legend: s tokens of the packed sequence, t = s/cp tokens of this rank, h query heads, g key/value heads of this
tensor-parallel rank, d head size.
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
    """The decoder's core attention: causal within documents, as the PackedSeqContext in `packed_seq_params` describes.

    The layer specs name this class; megatron-core's SelfAttention builds it, with the arguments of its own
    DotProductAttention, and calls it on every rank.
    """

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
        # megatron-core passes cp_comm_type only with context parallelism.
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
        """Rotate queries and keys, then attend.

        Args:
            query: [t, 1, h, d].
            key: [t, 1, g, d].
            value: [t, 1, g, d].
            attention_mask: ignored; the mask follows from the documents.
            packed_seq_params: layout, rotary table and, in generation, the KV cache.
            attn_mask_type: ignored.
            attention_bias: ignored.

        Returns:
            [t, 1, h * d], the dtype of `query`.
        """
        packed_seq = packed_seq_params
        assert packed_seq.layout is not None, "attention needs the layout of the packed sequence"
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq.rotary is not None:
            q, k = (rotate(x, packed_seq.rotary, interleaved=self.config.rotary_interleaved) for x in (q, k))
        if packed_seq.cache is not None:
            out = _cached_attention(q, k, v, packed_seq, self.layer_number, self.scale)
        else:
            schedule = packed_seq.schedule(q.device, self.cp_comm_type)
            out = document_attention(q, k, v, schedule, self.cp_group, self.scale)
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Empty: the module has no parameters."""
        return {}


class TowerCoreAttention(MegatronModule):
    """The vision tower's core attention: bidirectional over the patches of each tile, without context parallelism."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, /, **_: Any) -> Tensor:
        """query, key and value [patches, tiles, heads, d] -> [patches, tiles, heads * d]; the mask is ignored."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Empty: the module has no parameters."""
        return {}


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
        return _DocumentAttention.apply(q, k, v, schedule, cp_group, scale)
    assert cp_group is not None
    per_rank = [x.unflatten(1, (cp_group.size(), -1)) for x in (q, k, v)]
    qkv = exchange.scatter_heads(torch.cat(per_rank, dim=2), schedule, cp_group)
    heads = qkv.split([x.shape[2] for x in per_rank], dim=1)
    out = _DocumentAttention.apply(*heads, schedule, None, scale)
    return exchange.gather_heads(out, schedule, cp_group).flatten(1, 2)


class _DocumentAttention(torch.autograd.Function):
    """Attention over a block schedule; saves q, k, v, output and log-sum-exp of this rank's tokens only."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, group: dist.ProcessGroup | None, scale: float
    ) -> Tensor:
        kv_exchange = _start_exchange(k, v, schedule, group)  # overlaps with the diagonal blocks
        diagonal = schedule.diagonal
        out, lse = block_kernels.forward(
            diagonal.partition(q), diagonal.partition(k), diagonal.partition(v), diagonal.blocks, scale
        )
        out, lse = diagonal.collect(out), diagonal.collect(lse)
        if kv_exchange is not None:
            out = out.to(lse.dtype)
            for (step_k, step_v), blocks_of_step in zip(kv_exchange.steps(), schedule.steps, strict=True):
                for off in blocks_of_step:
                    inputs = off.queries.gather(q), off.keys.gather(step_k), off.keys.gather(step_v)
                    off_out, off_lse = block_kernels.forward(*inputs, blocks=off.blocks, scale=scale)
                    merged = block_kernels.merge(off.queries.gather(out), off.queries.gather(lse), off_out, off_lse)
                    for target, values in zip((out, lse), merged, strict=True):
                        off.queries.scatter_(target, values)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        schedule, group, scale = ctx.settings
        kv_exchange = _start_exchange(k, v, schedule, group)
        diagonal = schedule.diagonal
        d_out = diagonal.partition(grad)
        if diagonal.padding is not None:
            d_out.index_fill_(0, diagonal.padding, 0)  # in place: `partition` made a copy wherever there is padding
        saved = (
            diagonal.partition(q),
            diagonal.partition(k),
            diagonal.partition(v),
            diagonal.partition(out),
            diagonal.partition(lse),
        )
        grads = block_kernels.backward(d_out, *saved, blocks=diagonal.blocks, scale=scale)
        dq, dk, dv = (diagonal.collect(x) for x in grads)
        if kv_exchange is not None:
            dq = dq.to(lse.dtype)
            for (step_k, step_v), blocks_of_step in zip(kv_exchange.steps(), schedule.steps, strict=True):
                d_kv = torch.zeros(len(step_k), 2, *k.shape[1:], dtype=lse.dtype, device=k.device)
                for off in blocks_of_step:
                    of_queries = off.queries.gather
                    inputs = (
                        of_queries(grad),
                        of_queries(q),
                        off.keys.gather(step_k),
                        off.keys.gather(step_v),
                        of_queries(out),
                        of_queries(lse),
                    )
                    off_grads = block_kernels.backward(*inputs, blocks=off.blocks, scale=scale)
                    off.queries.scatter_add_(dq, off_grads[0])
                    for target, values in zip(d_kv.unbind(1), off_grads[1:], strict=True):
                        off.keys.scatter_add_(target, values)
                kv_exchange.accumulate_grad(d_kv)
            dk, dv = (x + off for x, off in zip((dk, dv), kv_exchange.finalize_grad().unbind(1), strict=True))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


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


def _cached_attention(
    q: Tensor, k: Tensor, v: Tensor, packed_seq: PackedSeqContext, layer: int, scale: float
) -> Tensor:
    """Attention of the new tokens to the KV cache of their sequence and, causally, to each other.

    Args:
        q: [t, h, d], rotary embedding applied.
        k: [t, g, d], likewise; appended to the cache of `layer`.
        v: [t, g, d], likewise.
        packed_seq: its `cache` is set.
        layer: megatron-core's layer number.
        scale: softmax scale.

    Returns:
        [t, h, d]; zero for padding tokens after a prefill.
    """
    assert packed_seq.cache is not None
    plan = packed_seq.decoding(q.device)
    keys, values = packed_seq.cache.append(layer, k, v, plan)
    if plan.prefill:
        return document_attention(q, k, v, packed_seq.schedule(q.device), None, scale)
    sequences, longest, _ = plan.mask.shape
    padded = q.new_zeros(sequences * longest, *q.shape[1:]).index_copy_(0, plan.padded_index, q[: plan.num_new])
    out = F.scaled_dot_product_attention(
        padded.unflatten(0, (sequences, longest)).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=plan.mask[:, None],
        scale=scale,
        enable_gqa=True,
    )
    unpadded = out.transpose(1, 2).flatten(0, 1).index_select(0, plan.padded_index)
    if plan.num_new == len(q):
        return unpadded
    return torch.cat([unpadded, torch.zeros_like(q[plan.num_new :])])  # documents beyond the sequences are padding
