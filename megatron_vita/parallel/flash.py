"""Variable-length flash attention on CUDA, with log-sum-exp. Not verified: it has never run on a GPU.

Uses the flash-attn package if it is installed, else the kernels that PyTorch ships. checks/kernels.py compares both
with the reference implementation; run tools/check_parallel.py on a GPU before relying on them. Legend: h query heads, g
key/value heads, d head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_vita.device import on_accelerator

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("flash_attn") is not None
"""The flash-attn package is installed."""

Bounds = tuple[Tensor, Tensor]
"""cu_seqlens_q and cu_seqlens_k, int32 [blocks + 1]."""
Longest = tuple[int, int]
"""max_seqlen_q and max_seqlen_k."""


def fits(q: Tensor) -> bool:
    """True if these kernels support q [queries, h, d]: on CUDA, float16 or bfloat16, d a multiple of 8 up to 256."""
    return on_accelerator(q) and q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: Longest, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its own block, by one kernel call.

    Args:
        q: [queries, h, d], float16 or bfloat16.
        k: [keys, g, d].
        v: [keys, g, d].
        bounds: cu_seqlens of queries and keys, int32 [blocks + 1] each.
        longest: max_seqlen of queries and keys.
        causal: query i of a block attends to its keys 0..i only.
        scale: softmax scale.

    Returns:
        output [queries, h, d] and log-sum-exp [queries, h], float32.
    """
    run = _flash_attn_forward if INSTALLED else _torch_forward
    out, lse = run(q, k, v, bounds, longest, causal, scale)
    return out, lse.t()


def reads_pages(block_size: int, dtype: torch.dtype) -> bool:
    """True if the kernels read a cache through block tables: FlashAttention-2 does for blocks of a multiple of 256."""
    return dtype in _HALF and block_size % 256 == 0


def paged_forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    table: Tensor,
    lengths: Tensor,
    longest: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one query of each sequence to its tokens in a cache of blocks, by one kernel call.

    Args:
        q: [B, h, d], float16 or bfloat16.
        keys: [blocks, block_size, g, d].
        values: [blocks, block_size, g, d].
        bounds: int32 [B + 1], cu_seqlens of the queries.
        table: int32 [B, most blocks of a sequence].
        lengths: int32 [B], tokens of each sequence.
        longest: largest of them.
        scale: softmax scale.

    Returns:
        output [B, h, d] and log-sum-exp [B, h], float32; undefined where a sequence has no tokens.
    """
    out, lse, *_ = _aten._flash_attention_forward(
        q, keys, values, bounds, None, 1, longest, 0.0, False, False, scale=scale, seqused_k=lengths, block_table=table
    )
    return out, lse.t()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    longest: Longest,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contribution of the blocks to the gradients, by one kernel call.

    Args:
        grad: [queries, h, d], gradient of the attention output over all keys.
        q: [queries, h, d].
        k: [keys, g, d].
        v: [keys, g, d].
        out: [queries, h, d], attention output over all keys of each query, not only the block's.
        lse: [queries, h], float32, log-sum-exp over all keys of each query.
        bounds: as in `forward`.
        longest: as in `forward`.
        causal: as in `forward`.
        scale: as in `forward`.

    Returns:
        gradients of q [queries, h, d], k and v [keys, g, d].
    """
    run = _flash_attn_backward if INSTALLED else _torch_backward
    return run(grad.contiguous(), q, k, v, out, lse.t().contiguous(), bounds, longest, causal, scale)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: Longest, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._flash_attention_forward(q, k, v, *bounds, *longest, 0.0, causal, False, scale=scale)
    return out, lse


def _torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bounds: Bounds, longest: Longest, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The kernel reads the RNG state only with dropout.
    rng_state = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _aten._flash_attention_backward(
        grad, q, k, v, out, lse, *bounds, *longest, 0.0, causal, rng_state, rng_state, scale=scale
    )
    return dq, dk, dv


def _options(causal: bool, scale: float) -> dict[str, Any]:
    """Keyword arguments of flash-attn's functions, versions 2.7.1 to 2.8."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: Longest, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *bounds, *longest, **_options(causal, scale))
    return out, lse


def _flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bounds: Bounds, longest: Longest, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _flash_attn_varlen_backward(
        grad, q, k, v, out, lse, *grads, *bounds, *longest, **_options(causal, scale), deterministic=False
    )
    dq, dk, dv = grads
    return dq, dk, dv


FLASH_ATTN = "flash-attn varlen"
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch flash varlen": (_torch_forward, _torch_backward),
    FLASH_ATTN: (_flash_attn_forward, _flash_attn_backward),
}
"""Kernel name -> (forward, backward); flash-attn is preferred where it is installed."""
