"""Attention of new tokens to the key/value cache, whose tokens are spread over the context-parallel ranks.

Prefill: the tokens of a chunk attend to each other as in training (document_attention) and to the earlier tokens of
their sequence, which need no mask. Either the chunk's queries travel to the ranks that hold the keys and partial
outputs travel back, or the keys travel around a ring: `passes_queries` decides by the bytes of both ways.

Decode: every rank has the queries of all decoding sequences. It attends to its own part of each sequence, and one
all-gather of partial outputs and log-sum-exps gives every rank the same result, bit for bit.

No mask of queries and keys is ever built: a kernel call covers a run of cached tokens, all of which are visible.
Nothing is written to the cache but the new tokens. Bytes that a rank receives per layer, with n context ranks, t of its
tokens in chunks, c cached tokens of the chunks' sequences on the rank that has most, B decoding sequences, h query
heads, g key/value heads, d head size, e bytes per element of the model's dtype:

    passing queries   (n - 1) t h (d e + 4 (d + 1))
    passing keys      (n - 1) c 2 g d e
    decode            (n - 1) B h 4 (d + 1)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel import block_table_kernels
from megatron_vita.parallel.block_kernels import merge
from megatron_vita.parallel.collectives import exchange_tokens, gather_tokens, ring_send_recv
from megatron_vita.parallel.decode_tables import DecodeTables
from megatron_vita.parallel.document_attention import attend
from megatron_vita.parallel.kv_cache import CachedPrefix, CacheStep
from megatron_vita.parallel.schedule import Schedule


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: CacheStep,
    schedule: Schedule | None,
    layer: int,
    cp_group: dist.ProcessGroup | None,
    scale: float,
) -> Tensor:
    """Store the new keys and values, and attend to all of each sequence. All ranks of `cp_group` call it.

    Args:
        q: [t, h, d], rotary embedding applied: the chunks' tokens, then those that decode.
        k: [t, g, d], rotary embedding applied.
        v: [t, g, d].
        step: of this forward pass.
        schedule: block schedule of the chunks' packed sequence, `p2p` or `all_gather`; None without chunks.
        layer: megatron-core's layer number.
        cp_group: the context-parallel ranks.
        scale: softmax scale.

    Returns:
        [t, h, d], the dtype of q; any value for padding.
    """
    group = cp_group if cp_group is not None and cp_group.size() > 1 else None
    step.cache.write(layer, k, v, step)
    chunk = step.prefill_tokens
    outputs = []
    if chunk:
        assert schedule is not None, "a packed sequence has a schedule"
        outputs.append(_prefill(q[:chunk], k[:chunk], v[:chunk], step, schedule, layer, group, scale))
    if step.decodes is not None:
        outputs.append(_decode(q[chunk:], *step.cache[layer], step.decodes, group, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def passes_queries(*, queries: int, keys: int, heads: int, groups: int, head_dim: int, itemsize: int) -> bool:
    """True if a chunk's queries and their partial outputs are fewer bytes than the cached keys and values.

    Args:
        queries: tokens of the packed sequence on one rank.
        keys: cached tokens of its sequences on the rank that has most of them.
        heads: query heads of a rank.
        groups: key/value heads of a rank.
        head_dim: numbers of a head.
        itemsize: bytes per element of queries, keys and values; partial outputs have 4 or more.
    """
    partial = (head_dim + 1) * max(itemsize, 4)
    return queries * heads * (head_dim * itemsize + partial) < keys * 2 * groups * head_dim * itemsize


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: CacheStep,
    schedule: Schedule,
    layer: int,
    group: dist.ProcessGroup | None,
    scale: float,
) -> Tensor:
    """[t, h, d]: attention of the chunks' tokens to each other and to their cached prefixes."""
    out, lse = attend(q, k, v, schedule, group, scale)
    if not step.prefixes:
        return out.to(q.dtype)
    keys, values = step.cache[layer]
    most = max(sum(prefix.tokens[rank] for prefix in step.prefixes) for rank in range(len(step.prefixes[0].tokens)))
    if group is None:
        earlier = _attend_prefixes(q, keys, values, step.prefixes, 0, scale)
    elif passes_queries(
        queries=len(q), keys=most, heads=q.shape[1], groups=k.shape[1], head_dim=q.shape[2], itemsize=q.itemsize
    ):
        earlier = _pass_queries(q, keys, values, step.prefixes, group, scale)
    else:
        earlier = _pass_keys(q, keys, values, step.prefixes, most, group, scale)
    return merge(out.to(lse.dtype), lse, *earlier)[0].to(q.dtype)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [n, h] over no keys at all, float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:2], float("-inf"), dtype=wide)


def _attend_prefixes(
    q: Tensor, keys: Tensor, values: Tensor, prefixes: tuple[CachedPrefix, ...], rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one rank's queries [t, h, d] to the prefixes' tokens in this rank's cache; (output, log-sum-exp)."""
    out, lse = _nothing(q)
    for prefix in prefixes:
        first, count = prefix.rows[rank]
        if count and prefix.runs:
            rows = slice(first, first + count)
            out[rows], lse[rows] = block_table_kernels.attend(q[rows], keys, values, prefix.runs, scale)
    return out, lse


def _pass_queries(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefixes: tuple[CachedPrefix, ...],
    group: dist.ProcessGroup,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries [t, h, d] to the prefixes on all ranks: queries travel, then partial results."""
    ranks = group.size()
    everybody = gather_tokens(q, group).wait().unflatten(0, (ranks, -1))
    partial = [_attend_prefixes(everybody[rank], keys, values, prefixes, rank, scale) for rank in range(ranks)]
    sent = torch.cat([torch.cat([out, lse.unsqueeze(-1)], dim=-1) for out, lse in partial])
    received = exchange_tokens(sent, [len(q)] * ranks, [len(q)] * ranks, group)
    return _merge_ranks(received.unflatten(0, (ranks, -1)))


def _pass_keys(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefixes: tuple[CachedPrefix, ...],
    most: int,
    group: dist.ProcessGroup,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries [t, h, d] to the prefixes on all ranks: keys and values travel around a ring."""
    rank, ranks = group.rank(), group.size()
    travelling = keys.new_empty(most, 2, *keys.shape[1:])  # equally long on every rank
    place = 0
    for prefix in prefixes:
        for slot, count in prefix.runs:
            for side, stored in enumerate((keys, values)):
                travelling[place : place + count, side] = stored[slot : slot + count]
            place += count
    out, lse = _nothing(q)
    for hop in range(ranks):
        following = ring_send_recv(travelling, group, tag=0) if hop < ranks - 1 else None
        source = (rank - hop) % ranks
        place = 0
        for prefix in prefixes:
            (first, count), cached = prefix.rows[rank], prefix.tokens[source]
            if count and cached:
                rows = slice(first, first + count)
                part = block_table_kernels.attend(
                    q[rows], travelling[:, 0], travelling[:, 1], ((place, cached),), scale
                )
                out[rows], lse[rows] = merge(out[rows], lse[rows], *part)
            place += cached
        if following is not None:
            travelling = following.wait()
    return out, lse


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    decodes: DecodeTables,
    group: dist.ProcessGroup | None,
    scale: float,
) -> Tensor:
    """[B, h, d]: attention of one query of each sequence to all of its cached tokens on all ranks."""
    if group is None:
        return block_table_kernels.decode(q, keys, values, decodes, scale)[0].to(q.dtype)
    out, lse = block_table_kernels.decode(q, keys, values, decodes, scale)
    partial = torch.cat([out, lse.unsqueeze(-1)], dim=-1)
    everybody = gather_tokens(partial, group).wait().unflatten(0, (group.size(), -1))
    return _merge_ranks(everybody)[0].to(q.dtype)


def _merge_ranks(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partial results of all ranks, always in rank order.

    Args:
        partial: [ranks, n, h, d + 1], output and log-sum-exp over each rank's keys, -inf where a rank has none.

    Returns:
        output [n, h, d] and log-sum-exp [n, h] over all keys; zeros and -inf where no rank has any.
    """
    out, lse = partial[..., :-1], partial[..., -1]
    total = torch.logsumexp(lse, dim=0)
    weight = (lse - total).exp().nan_to_num(0.0).unsqueeze(-1)  # no keys anywhere: -inf - -inf
    return (out * weight).sum(0), total
