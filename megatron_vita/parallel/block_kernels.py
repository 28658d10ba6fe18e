"""One block of attention, with its log-sum-exp, forward and backward: the kernels that the block schedule calls.

A kernel computes softmax(q k^T * scale) v over the keys of one block only; its log-sum-exp lets blocks be merged
afterwards. The backward takes the output and the log-sum-exp of the *whole* row and then gives this block's exact share
of the gradients. `plain_forward` and `plain_backward` are the readable twins, used where no kernel fits and by the
tests.

Shapes: n blocks of equal shape, h query heads, g key/value heads (g divides h; query head i reads key head i * g // h).
Keys and values go through `expand` first, and their gradients through `reduce`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of n blocks.

    Args:
        q: [n, h, lq, d].
        k: [n, g, lk, d].
        v: [n, g, lk, d].
        causal: query i sees keys 0..i; needs lq == lk.
        scale: factor on the scores.

    Returns:
        output [n, h, lq, d] (laid out as [n, lq, h, d]) and log-sum-exp [n, h, lq], float32 or wider.
    """
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.dtype in _HALF:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    return plain_forward(q, k, v, causal=causal, scale=scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients.

    Args:
        grad: [n, h, lq, d], gradient of the row's output.
        q: [n, h, lq, d].
        k: [n, g, lk, d].
        v: [n, g, lk, d].
        out: [n, h, lq, d], output over all the keys of the row.
        lse: [n, h, lq], log-sum-exp over all the keys of the row.
        causal: as in the forward.
        scale: as in the forward.

    Returns:
        gradients of q [n, h, lq, d], k and v [n, g, lk, d].
    """
    if not q.is_cuda:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv
    if q.dtype in _HALF:
        # The philox state only matters with dropout; an empty one of the type that the forward returns.
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    return plain_backward(grad, q, k, v, out, lse, causal=causal, scale=scale)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Twin of `forward` in elementary operations; holds all scores in memory."""
    k, v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    scores = _scores(q, k, causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)
    return out.to(q.dtype), lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `backward` in elementary operations."""
    heads = k.shape[1]
    wide_k, wide_v = _each_head(k, q.shape[1]), _each_head(v, q.shape[1])
    p = (_scores(q, wide_k, causal, scale) - lse.unsqueeze(-1)).exp()  # [n, h, lq, lk], shares of the whole row
    work = p.dtype
    grad, out = grad.to(work), out.to(work)
    dv = p.transpose(-1, -2) @ grad
    dp = grad @ wide_v.to(work).transpose(-1, -2)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
    dq = ds @ wide_k.to(work)
    dk = ds.transpose(-1, -2) @ q.to(work)
    return dq.to(q.dtype), _each_group(dk, heads).to(k.dtype), _each_group(dv, heads).to(v.dtype)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each. float32 or wider.

    Args:
        out: [rows, h, d].
        lse: [rows, h].
        other_out: [rows, h, d].
        other_lse: [rows, h].
    """
    both = torch.logaddexp(lse, other_lse)
    mine = (lse - both).exp().unsqueeze(-1)
    theirs = (other_lse - both).exp().unsqueeze(-1)
    return out * mine + other_out * theirs, both


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def expand(keys: Tensor, queries: Tensor) -> Tensor:
    """Keys or values as this device's kernel reads them: the CPU kernel wants a key head for every query head.

    Args:
        keys: [rows, g, d].
        queries: [rows, h, d].

    Returns:
        [rows, h, d] on CPU, `keys` itself elsewhere.
    """
    if keys.is_cuda:
        return keys
    rows, groups, size = keys.shape
    heads = queries.shape[1]
    if groups == heads:
        return keys
    return keys.unsqueeze(2).expand(rows, groups, heads // groups, size).reshape(rows, heads, size)


def reduce(grad: Tensor, groups: int) -> Tensor:
    """The adjoint of `expand`: [rows, h or g, d] -> [rows, g, d]."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


def _each_head(keys: Tensor, heads: int) -> Tensor:
    """[n, g, l, d] -> [n, heads, l, d]: each key head repeated for the query heads that read it."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _each_group(grad: Tensor, groups: int) -> Tensor:
    """The adjoint of `_each_head`."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)
