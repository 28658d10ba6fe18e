"""Attention over blocks of keys, forward and backward: the kernels that parallel/attention.py calls per schedule entry.

The forward of a block computes softmax(q k^T * scale) v over the block's keys only, and the log-sum-exp of its scores,
with which `merge` combines blocks. The backward of a block takes the output and log-sum-exp over *all* keys of a query
and returns the block's exact contribution to the gradients.

kernels.py chooses: on CPU PyTorch's CPU flash attention, one call per run of blocks of equal shape; on GPUs in half
precision variable-length flash attention (parallel/flash.py), one call for all blocks; else `reference_forward` and
`reference_backward`, the reference implementation that the tests compare the kernels with. Legend: h query heads, g
key/value heads (GQA: g divides h; query head i uses key/value head i * g // h), d head size, lq and lk queries and keys
of a block, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vita import kernels
from megatron_vita.kernels import Attention
from megatron_vita.parallel import flash

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shapes of consecutive blocks: block i covers the tokens of q, k and v that follow those of block i - 1."""

    runs: tuple[tuple[int, int, int], ...]
    """Run-length encoding, in order: (blocks, queries per block, keys per block)."""
    causal: bool
    """True: query i of a block attends to its keys 0..i, and lq == lk. False: every query attends to every key."""
    bounds: tuple[Tensor, Tensor] | None = None
    """`cu_seqlens` of the queries and of the keys for variable-length kernels, int32 `[blocks + 1]` each; None on CPU,
    whose kernel uses `runs`."""

    @property
    def pairs(self) -> int:
        """Query-key pairs that a kernel computes; each costs 4 * d floating-point operations in the forward."""
        one = (lambda q, k: q * (q + 1) // 2) if self.causal else (lambda q, k: q * k)
        return sum(blocks * one(queries, keys) for blocks, queries, keys in self.runs)

    @property
    def longest(self) -> tuple[int, int]:
        """(max_seqlen_q, max_seqlen_k): the largest lq and the largest lk of all blocks."""
        return max(queries for _, queries, _ in self.runs), max(keys for _, _, keys in self.runs)


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its own block, by the kernel that fits the device and dtype.

    Args:
        q: [queries, h, d].
        k: [keys, g, d].
        v: [keys, g, d].
        blocks: shapes of the blocks, which partition queries and keys.
        scale: softmax scale.

    Returns:
        output [queries, h, d] in the dtype of q, and log-sum-exp [queries, h] in float32 or wider.
    """
    kernel = kernels.on(q.device).attention(q.dtype, q.shape[-1])
    if kernel.variable_length:
        assert blocks.bounds is not None, "a schedule for this device has bounds"
        return flash.forward(kernel, q, k, v, blocks.bounds, blocks.longest, causal=blocks.causal, scale=scale)
    run = cpu_forward if kernel is Attention.CPU_FLASH else reference_forward
    return by_runs(run, blocks, scale, (q,), (k, v))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contribution of the blocks to the gradients, by the kernel that fits the device and dtype.

    Args:
        grad: [queries, h, d], gradient of the attention output over all keys.
        q: [queries, h, d].
        k: [keys, g, d].
        v: [keys, g, d].
        out: [queries, h, d], attention output over all keys of each query, not only the block's.
        lse: [queries, h], log-sum-exp over all keys of each query.
        blocks: as in `forward`.
        scale: as in `forward`.

    Returns:
        gradients of q [queries, h, d], k and v [keys, g, d], to be summed over the blocks.
    """
    kernel = kernels.on(q.device).attention(q.dtype, q.shape[-1])
    if kernel.variable_length:
        assert blocks.bounds is not None, "a schedule for this device has bounds"
        bounds, longest = blocks.bounds, blocks.longest
        return flash.backward(kernel, grad, q, k, v, out, lse, bounds, longest, causal=blocks.causal, scale=scale)
    run = cpu_backward if kernel is Attention.CPU_FLASH else reference_backward
    return by_runs(run, blocks, scale, (grad, q), (k, v), (out, lse))


def by_runs(kernel: Callable[..., Any], blocks: Blocks, scale: float, *sides: Sequence[Tensor]) -> Any:
    """Apply a kernel for blocks of equal shape to every run, and concatenate the results.

    Args:
        kernel: `reference_forward`, `reference_backward`, `cpu_forward` or `cpu_backward`.
        blocks: shapes of the blocks.
        scale: softmax scale.
        sides: the kernel's inputs, each [queries or keys, heads, ...], in groups that alternate: indexed by query, by
            key, by query.

    Returns:
        the kernel's results, each [queries or keys, heads, ...].
    """
    results = []
    at = [0, 0]
    for count, *each in blocks.runs:
        inputs = [
            tokens.narrow(0, at[side % 2], count * each[side % 2]).unflatten(0, (count, -1)).transpose(1, 2)
            for side, tensors in enumerate(sides)
            for tokens in tensors
        ]
        results.append(kernel(*inputs, causal=blocks.causal, scale=scale))
        at = [start + count * length for start, length in zip(at, each, strict=True)]
    return tuple(_concatenate(of_runs) for of_runs in zip(*results, strict=True))


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """`merge` in place, into `out` and `lse`."""
    out.lerp_(other_out.to(out.dtype), torch.sigmoid(other_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over their union, in the dtype of `out`.

    Args:
        out: [queries, h, d], output over the first set, float32 or wider.
        lse: [queries, h], log-sum-exp over the first set, of the same dtype.
        other_out: [queries, h, d], output over the second set, of any dtype.
        other_lse: [queries, h], log-sum-exp over the second set.

    Returns:
        output [queries, h, d] and log-sum-exp [queries, h] over the union.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # softmax mass of the second set
    return torch.lerp(out, other_out.to(out.dtype), weight), torch.logaddexp(lse, other_lse)


def reference_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of n blocks of equal shape, unfused: materialises all scores.

    Args:
        q: [n, h, lq, d].
        k: [n, g, lk, d].
        v: [n, g, lk, d].
        causal: query i attends to keys 0..i only.
        scale: softmax scale.

    Returns:
        output [n, h, lq, d] and log-sum-exp [n, h, lq], float32 or wider.
    """
    k, v = _expand_kv_heads(k, q.shape[1]), _expand_kv_heads(v, q.shape[1])
    scores = _scores(q, k, causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)
    return out.to(q.dtype), lse


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [n, h, lq, d], k and v [n, g, lk, d] for n blocks of equal shape, unfused.

    Arguments as in `reference_forward`; grad and out [n, h, lq, d] and lse [n, h, lq] are over all keys of each query.
    """
    groups = k.shape[1]
    wide_k, wide_v = _expand_kv_heads(k, q.shape[1]), _expand_kv_heads(v, q.shape[1])
    p = (_scores(q, wide_k, causal, scale) - lse.unsqueeze(-1)).exp()  # [n, h, lq, lk], probabilities over all keys
    work = p.dtype
    grad, out = grad.to(work), out.to(work)
    dv = p.transpose(-1, -2) @ grad
    dp = grad @ wide_v.to(work).transpose(-1, -2)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
    dq = ds @ wide_k.to(work)
    dk = ds.transpose(-1, -2) @ q.to(work)
    return dq.to(q.dtype), _reduce_kv_heads(dk, groups).to(k.dtype), _reduce_kv_heads(dv, groups).to(v.dtype)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`reference_forward` by PyTorch's CPU flash attention, which needs as many key/value heads as query heads."""
    k, v = _expand_kv_heads(k, q.shape[1]), _expand_kv_heads(v, q.shape[1])
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_backward` by PyTorch's CPU flash attention."""
    groups = k.shape[1]
    k, v = _expand_kv_heads(k, q.shape[1]), _expand_kv_heads(v, q.shape[1])
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, _reduce_kv_heads(dk, groups), _reduce_kv_heads(dv, groups)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _concatenate(results: Sequence[Tensor]) -> Tensor:
    """Results of all runs, [n, heads, l, ...] each -> [sum of n * l, heads, ...]."""
    tokens = [result.transpose(1, 2).flatten(0, 1) for result in results]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _expand_kv_heads(keys: Tensor, heads: int) -> Tensor:
    """[n, g, l, d] -> [n, heads, l, d]: each key/value head repeated for the query heads that share it."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _reduce_kv_heads(grad: Tensor, groups: int) -> Tensor:
    """[n, h, l, d] -> [n, groups, l, d]: summed over the query heads of a group; the backward of `_expand_kv_heads`."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)
