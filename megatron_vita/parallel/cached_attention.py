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
from megatron_vita.parallel.block_kernels import merge_
from megatron_vita.parallel.collectives import exchange_tokens, gather_tokens, ring_send_recv
from megatron_vita.parallel.decode_tables import DecodeTables, Runs
from megatron_vita.parallel.document_attention import attend
from megatron_vita.parallel.kv_cache import CachedPrefix, CacheStep
from megatron_vita.parallel.schedule import Schedule

_ROWS = 1024
"""Queries of one kernel call in prefill, at most."""


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
    out = out.to(lse.dtype)
    keys, values = step.cache[layer]
    most = max(sum(prefix.tokens[rank] for prefix in step.prefixes) for rank in range(len(step.prefixes[0].tokens)))
    if group is None:
        for prefix in step.prefixes:
            _add_runs(out, lse, q, keys, values, prefix.runs, prefix.rows[0], scale)
    elif passes_queries(
        queries=len(q), keys=most, heads=q.shape[1], groups=k.shape[1], head_dim=q.shape[2], itemsize=q.itemsize
    ):
        _pass_queries(out, lse, q, keys, values, step.prefixes, group, scale)
    else:
        _pass_keys(out, lse, q, keys, values, step.prefixes, most, group, scale)
    return out.to(q.dtype)


# Queries and partial results of all ranks are the largest tensors of a chunk: each result is added in place as soon as
# it is known, and kernels see some of a chunk's rows at a time.


def _add_runs(
    out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, runs: Runs, rows: tuple[int, int], scale: float
) -> None:
    """Add attention of the queries `rows` (first, number) to runs of tokens, if there are any."""
    first, count = rows
    for start in range(first, first + count if runs else first, _ROWS):
        some = slice(start, min(start + _ROWS, first + count))
        merge_(out[some], lse[some], *block_table_kernels.attend(q[some], keys, values, runs, scale))


def _pass_queries(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefixes: tuple[CachedPrefix, ...],
    group: dist.ProcessGroup,
    scale: float,
) -> None:
    """Add attention of this rank's queries to the prefixes on all ranks: queries travel, then partial results."""
    ranks, (tokens, heads, size) = group.size(), q.shape
    everybody = gather_tokens(q, group).wait().unflatten(0, (ranks, -1))
    partial = out.new_zeros(ranks, tokens, heads, size + 1)
    partial[..., -1] = float("-inf")
    for rank in range(ranks):
        for prefix in prefixes:
            place = partial[rank, ..., :-1], partial[rank, ..., -1]
            _add_runs(*place, everybody[rank], keys, values, prefix.runs, prefix.rows[rank], scale)
    del everybody, place
    partial = exchange_tokens(partial.flatten(0, 1), [tokens] * ranks, [tokens] * ranks, group)
    for one in partial.unflatten(0, (ranks, -1)):
        merge_(out, lse, one[..., :-1], one[..., -1])


def _pass_keys(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefixes: tuple[CachedPrefix, ...],
    most: int,
    group: dist.ProcessGroup,
    scale: float,
) -> None:
    """Add attention of this rank's queries to the prefixes on all ranks: keys and values travel around a ring."""
    rank, ranks = group.rank(), group.size()
    travelling = keys.new_empty(most, 2, *keys.shape[1:])  # equally long on every rank
    place = 0
    for prefix in prefixes:
        for slot, count in prefix.runs:
            for side, stored in enumerate((keys, values)):
                travelling[place : place + count, side] = stored[slot : slot + count]
            place += count
    for hop in range(ranks):
        following = ring_send_recv(travelling, group, tag=0) if hop < ranks - 1 else None
        source = (rank - hop) % ranks
        place = 0
        for prefix in prefixes:
            cached = prefix.tokens[source]
            runs = ((place, cached),) if cached else ()
            _add_runs(out, lse, q, travelling[:, 0], travelling[:, 1], runs, prefix.rows[rank], scale)
            place += cached
        if following is not None:
            travelling = following.wait()


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
