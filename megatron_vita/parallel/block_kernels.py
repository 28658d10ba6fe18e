"""Blocks of attention with their log-sum-exp, forward and backward: the kernels that the block schedule calls.

A kernel computes softmax(q k^T * scale) v over the keys of one block only; its log-sum-exp lets blocks be merged
afterwards. The backward takes the output and the log-sum-exp of the *whole* row and then gives the block's exact share
of the gradients. `plain_forward` and `plain_backward` are the readable twins, used where no kernel fits and by the
tests.

On CPU every run of equal blocks is one call of PyTorch's flash kernel; on CUDA in half precision all blocks are one
call of a variable-length flash kernel (parallel/flash.py). Legend: h query heads, g key/value heads (g divides h; query
head i reads key head i * g // h), d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vita.parallel import flash

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks that stand one after another in the rows of q, and of k and v, in runs of equal shape."""

    runs: tuple[tuple[int, int, int], ...]
    """(blocks, queries of each, keys of each) of every run."""
    causal: bool
    """Query i of a block sees its keys 0..i (queries == keys); otherwise every query sees every key."""
    bounds: tuple[Tensor, Tensor] | None = None
    """int32 `[blocks + 1]` twice: where the blocks begin among the queries and among the keys, for kernels that take
    blocks of any shape; none: for kernels that take runs."""

    @property
    def pairs(self) -> int:
        """Query-key pairs that a kernel computes, 4 * d operations each (forward)."""
        one = (lambda q, k: q * (q + 1) // 2) if self.causal else (lambda q, k: q * k)
        return sum(blocks * one(queries, keys) for blocks, queries, keys in self.runs)

    @property
    def longest(self) -> tuple[int, int]:
        """Queries of the block with the most, keys of the block with the most."""
        return max(queries for _, queries, _ in self.runs), max(keys for _, _, keys in self.runs)


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its block.

    Args:
        q: [queries, h, d].
        k: [keys, g, d].
        v: [keys, g, d].
        blocks: how the rows are cut.
        scale: factor on the scores.

    Returns:
        output [queries, h, d] and log-sum-exp [queries, h], float32 or wider.
    """
    if flash.fits(q):
        assert blocks.bounds is not None, "a schedule for this device has bounds"
        return flash.forward(q, k, v, blocks.bounds, blocks.longest, causal=blocks.causal, scale=scale)
    return by_runs(plain_forward if q.is_cuda else cpu_forward, blocks, scale, (q,), (k, v))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks' shares of the gradients.

    Args:
        grad: [queries, h, d], gradient of the row's output.
        q: [queries, h, d].
        k: [keys, g, d].
        v: [keys, g, d].
        out: [queries, h, d], output over all the keys of the row.
        lse: [queries, h], log-sum-exp over all the keys of the row.
        blocks: as in the forward.
        scale: as in the forward.

    Returns:
        gradients of q [queries, h, d], k and v [keys, g, d].
    """
    if flash.fits(q):
        assert blocks.bounds is not None, "a schedule for this device has bounds"
        bounds, longest = blocks.bounds, blocks.longest
        return flash.backward(grad, q, k, v, out, lse, bounds, longest, causal=blocks.causal, scale=scale)
    kernel = plain_backward if q.is_cuda else cpu_backward
    return by_runs(kernel, blocks, scale, (grad, q), (k, v), (out, lse))


def by_runs(kernel: Callable[..., Any], blocks: Blocks, scale: float, *sides: Sequence[Tensor]) -> Any:
    """A kernel of blocks of equal shape over every run.

    Args:
        kernel: one of the four at the end of this file.
        blocks: how the rows are cut.
        scale: factor on the scores.
        sides: the kernel's inputs as rows [rows, heads, ...]: of queries, of keys, of queries again.

    Returns:
        the kernel's results, as rows.
    """
    results = []
    at = [0, 0]
    for count, *each in blocks.runs:
        inputs = [
            rows.narrow(0, at[side % 2], count * each[side % 2]).unflatten(0, (count, -1)).transpose(1, 2)
            for side, tensors in enumerate(sides)
            for rows in tensors
        ]
        results.append(kernel(*inputs, causal=blocks.causal, scale=scale))
        at = [start + count * length for start, length in zip(at, each, strict=True)]
    return tuple(_join(parts) for parts in zip(*results, strict=True))


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    Args:
        out: [rows, h, d], float32 or wider.
        lse: [rows, h], of the same type.
        other_out: [rows, h, d], of any type.
        other_lse: [rows, h].
    """
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # what the other keys weigh
    return torch.lerp(out, other_out.to(out.dtype), share), torch.logaddexp(lse, other_lse)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of n blocks of equal shape in elementary operations; holds all scores in memory.

    Args:
        q: [n, h, lq, d].
        k: [n, g, lk, d].
        v: [n, g, lk, d].
        causal: query i sees keys 0..i.
        scale: factor on the scores.

    Returns:
        output [n, h, lq, d] and log-sum-exp [n, h, lq], float32 or wider.
    """
    k, v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    scores = _scores(q, k, causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)
    return out.to(q.dtype), lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of n blocks of equal shape, [n, h or g, l, d] each, in elementary operations."""
    groups = k.shape[1]
    wide_k, wide_v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    p = (_scores(q, wide_k, causal, scale) - lse.unsqueeze(-1)).exp()  # [n, h, lq, lk], shares of the whole row
    work = p.dtype
    grad, out = grad.to(work), out.to(work)
    dv = p.transpose(-1, -2) @ grad
    dp = grad @ wide_v.to(work).transpose(-1, -2)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
    dq = ds @ wide_k.to(work)
    dk = ds.transpose(-1, -2) @ q.to(work)
    return dq.to(q.dtype), _each_group(dk, groups).to(k.dtype), _each_group(dv, groups).to(v.dtype)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`plain_forward` by PyTorch's kernel, which wants a key head for every query head."""
    k, v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_backward` by PyTorch's kernel."""
    groups = k.shape[1]
    k, v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, _each_group(dk, groups), _each_group(dv, groups)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Results of several runs, [n, heads, l, ...] each, as rows [sum of n * l, heads, ...]."""
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _each_head(keys: Tensor, heads: int) -> Tensor:
    """[n, g, l, d] -> [n, heads, l, d]: each key head repeated for the query heads that read it."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _each_group(grad: Tensor, groups: int) -> Tensor:
    """The adjoint of `_each_head`."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)
