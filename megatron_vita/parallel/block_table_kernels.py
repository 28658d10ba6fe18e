"""Attention to cached tokens through block tables: every query sees every key, so there is no mask.

On CPU one call of PyTorch's flash attention covers one run of blocks, as a view; the query heads that share a key/value
head are queries of that head, so keys and values are neither copied nor repeated. Runs that are too short for a call of
their own are gathered, at most `_GATHERED` tokens at a time. On CUDA in half precision flash attention reads the cache
through the block table (parallel/flash.py). Legend: h query heads, g key/value heads, d head size, r = h / g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_vita.parallel.block_kernels import merge
from megatron_vita.parallel.kv_cache import Runs

_SHORT = 64
"""Tokens of a run below which gathering it with its neighbours costs less than a kernel call (measured on CPU)."""
_GATHERED = 16384
"""Tokens gathered for one kernel call, at most."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q: Tensor, keys: Tensor, values: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of queries to the tokens of one sequence.

    Args:
        q: [n, h, d], n >= 1.
        keys: [slots, g, d].
        values: [slots, g, d].
        runs: at least one.
        scale: softmax scale.

    Returns:
        output [n, h, d] and log-sum-exp [n, h], float32 or wider.
    """
    n, h, d = q.shape
    g = keys.shape[1]
    folded = q.reshape(n, g, h // g, d).transpose(0, 1).reshape(1, g, n * (h // g), d)
    out, lse = _over_runs(folded, keys, values, runs, scale)
    out = out.reshape(g, n, h // g, d).transpose(0, 1).reshape(n, h, d)
    return out, lse.reshape(g, n, h // g).transpose(0, 1).reshape(n, h)


def decode(q: Tensor, keys: Tensor, values: Tensor, tables: Sequence[Runs], scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query of each sequence to the tokens of that sequence.

    Args:
        q: [B, h, d].
        keys: [slots, g, d].
        values: [slots, g, d].
        tables: the runs of each sequence; [B]. None of them: output 0 and log-sum-exp -inf.
        scale: softmax scale.

    Returns:
        output [B, h, d] and log-sum-exp [B, h], float32 or wider.
    """
    count, h, d = q.shape
    g = keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(count, h, d, dtype=wide)
    lse = q.new_full((count, h), float("-inf"), dtype=wide)
    queries = q.reshape(count, 1, g, h // g, d).unbind(0)
    for one, (query, runs) in enumerate(zip(queries, tables, strict=True)):
        if runs:
            part, part_lse = _over_runs(query, keys, values, runs, scale)
            out[one], lse[one] = part.reshape(h, d), part_lse.reshape(h)
    return out, lse


def _over_runs(q: Tensor, keys: Tensor, values: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [1, g, n, d] to all runs: output [1, g, n, d] and log-sum-exp [1, g, n], float32 or wider."""
    out: Tensor | None = None
    lse: Tensor | None = None
    for k, v in _pieces(keys, values, runs):
        part, part_lse = _flash(
            q, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), 0.0, False, scale=scale
        )
        part = part.to(part_lse.dtype)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            out, lse = merge(out, lse, part, part_lse)
    assert out is not None
    assert lse is not None
    return out, lse


def _pieces(keys: Tensor, values: Tensor, runs: Runs) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of all runs, [tokens, g, d] each: a long run as a view, short ones gathered."""
    if len(runs) == 1:
        yield keys.narrow(0, *runs[0]), values.narrow(0, *runs[0])
        return
    short: list[tuple[int, int]] = []
    tokens = 0
    for run in runs:
        if run[1] >= _SHORT:
            yield keys.narrow(0, *run), values.narrow(0, *run)
            continue
        if tokens + run[1] > _GATHERED:
            yield _gather(keys, values, short)
            short, tokens = [], 0
        short.append(run)
        tokens += run[1]
    if short:
        yield _gather(keys, values, short)


def _gather(keys: Tensor, values: Tensor, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    index = torch.cat([torch.arange(slot, slot + tokens, device=keys.device) for slot, tokens in runs])
    return keys.index_select(0, index), values.index_select(0, index)
