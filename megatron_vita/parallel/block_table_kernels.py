"""Attention to cached tokens through block tables: every query sees every key of its sequence, so nothing is masked.

On CPU one call of PyTorch's flash attention covers one run of blocks, as a view; the query heads that share a key/value
head are queries of that head, so keys and values are neither copied nor repeated. Where copying costs less than a call,
tokens are gathered: runs of a few blocks, at most `_GATHERED` tokens at a time, and the sequences of a decoding batch
that hold few tokens, which are padded to the longest of them. Legend: h query heads, g key/value heads, d head size,
r = h / g, B sequences that decode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_vita import kernels
from megatron_vita.kernels import Attention
from megatron_vita.parallel import flash
from megatron_vita.parallel.block_kernels import merge, reference_forward
from megatron_vita.parallel.decode_tables import DecodeTables, Gathered, Pages, Runs, slots_of

_SHORT_RUN = 64
"""Tokens of a run below which gathering it with its neighbours costs less than a kernel call (measured on CPU)."""
_GATHERED = 16384
"""Tokens gathered for one kernel call, at most."""
Kernel = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Attention of q [1, g, n, d] to all of k and v [1, g, tokens, d]: output [1, g, n, d] and log-sum-exp [1, g, n]."""

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
    out, lse = _over_runs(folded, _by_head(keys), _by_head(values), runs, scale)
    out = out.reshape(g, n, h // g, d).transpose(0, 1).reshape(n, h, d)
    return out, lse.reshape(g, n, h // g).transpose(0, 1).reshape(n, h)


def decode(q: Tensor, keys: Tensor, values: Tensor, tables: DecodeTables, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query of each sequence to the tokens of that sequence.

    Args:
        q: [B, h, d].
        keys: [slots, g, d].
        values: [slots, g, d].
        tables: of the B sequences.
        scale: softmax scale.

    Returns:
        output [B, h, d] and log-sum-exp [B, h], float32 or wider; 0 and -inf for a sequence without tokens.
    """
    count, h, d = q.shape
    g = keys.shape[1]
    if tables.pages is not None:
        return _through_pages(q, keys, values, tables.pages, scale)
    folded = q.reshape(count, g, h // g, d)
    wide = torch.promote_types(q.dtype, torch.float32)
    some = tables.gathered
    if some is not None and len(some.rows) == count:
        out, lse = _gathered(folded, keys, values, some, scale)
        return out.reshape(count, h, d).to(wide), lse.reshape(count, h)
    out = q.new_zeros(count, g, h // g, d, dtype=wide)
    lse = q.new_full((count, g, h // g), float("-inf"), dtype=wide)
    if some is not None:
        part, part_lse = _gathered(folded.index_select(0, some.rows), keys, values, some, scale)
        out.index_copy_(0, some.rows, part.to(wide))
        lse.index_copy_(0, some.rows, part_lse)
    if tables.alone:
        keys, values = _by_head(keys), _by_head(values)
        for row, runs in tables.alone:
            part, part_lse = _over_runs(folded[row : row + 1], keys, values, runs, scale)
            out[row], lse[row] = part[0], part_lse[0]
    return out.view(count, h, d), lse.view(count, h)


def _through_pages(q: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> tuple[Tensor, Tensor]:
    """`decode` by flash attention on CUDA."""
    k, v = (x.unflatten(0, (-1, pages.block_size)) for x in (keys, values))  # [blocks, block_size, g, d]
    out, lse = flash.paged_forward(q, k, v, pages.bounds, pages.table, pages.lengths, pages.longest, scale=scale)
    # A sequence without tokens on this rank: whatever the kernel says counts for nothing.
    empty = (pages.lengths == 0)[:, None]
    return out.float().masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))


def _by_head(stored: Tensor) -> Tensor:
    """[slots, g, d] -> [1, g, slots, d], a view."""
    return stored.transpose(0, 1).unsqueeze(0)


def _gathered(q: Tensor, keys: Tensor, values: Tensor, some: Gathered, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [b, g, r, d] to the gathered tokens of each sequence: [b, g, r, d] and [b, g, r]."""
    k, v = (x.index_select(0, some.slots).unflatten(0, (len(q), -1)).transpose(1, 2) for x in (keys, values))
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=some.hidden.to(q.dtype), scale=scale)
    return out, lse


def _over_runs(q: Tensor, keys: Tensor, values: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [1, g, n, d] to runs of keys and values [1, g, slots, d].

    Returns:
        output [1, g, n, d] and log-sum-exp [1, g, n], float32 or wider.
    """
    kernel = _kernel(q)
    pieces = _pieces(keys, values, runs)
    out, lse = kernel(q, *next(pieces), scale)
    out = out.to(lse.dtype)
    for k, v in pieces:
        out, lse = merge(out, lse, *kernel(q, k, v, scale))
    return out, lse


def _pieces(keys: Tensor, values: Tensor, runs: Runs) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of all runs, [1, g, tokens, d] each: a long run as a view, short ones gathered."""
    if len(runs) == 1:
        ((slot, tokens),) = runs
        yield keys.narrow(2, slot, tokens), values.narrow(2, slot, tokens)
        return
    short: list[tuple[int, int]] = []
    gathered = 0
    for slot, tokens in runs:
        if tokens >= _SHORT_RUN:
            yield keys.narrow(2, slot, tokens), values.narrow(2, slot, tokens)
            continue
        if gathered + tokens > _GATHERED:
            yield _gather(keys, values, short)
            short, gathered = [], 0
        short.append((slot, tokens))
        gathered += tokens
    if short:
        yield _gather(keys, values, short)


def _gather(keys: Tensor, values: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(slots_of(runs)).to(keys.device)
    return keys.index_select(2, index), values.index_select(2, index)


def _kernel(q: Tensor) -> Kernel:
    kernel = kernels.on(q.device).attention(q.dtype, q.shape[-1])
    if kernel.variable_length:
        return functools.partial(_variable_length, kernel)
    return _on_cpu if kernel is Attention.CPU_FLASH else _reference


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _flash(q, k, v, 0.0, False, scale=scale)
    return out, lse


def _variable_length(kernel: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Made on the device: a tensor of host values would be copied, and the host would wait.
    of_queries, of_keys = (torch.arange(2, dtype=torch.int32, device=q.device) * x.shape[2] for x in (q, k))
    query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))  # [tokens, heads, d]
    bounds, longest = (of_queries, of_keys), (q.shape[2], k.shape[2])
    out, lse = flash.forward(kernel, query, key, value, bounds, longest, causal=False, scale=scale)
    return out.transpose(0, 1).unsqueeze(0), lse.t().unsqueeze(0)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return reference_forward(q, k, v, causal=False, scale=scale)
