"""Variable-length flash attention on GPUs, with log-sum-exp. Not verified: it has never run on a GPU.

kernels.py chooses between flash-attn 3, flash-attn 2 and the kernels that PyTorch ships. checks/kernels.py compares
each with the reference implementation; run tools/check_parallel.py on a GPU before relying on them. Legend: h query
heads, g key/value heads, d head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_vita.kernels import Attention, parameters

_aten = torch.ops.aten

Bounds = tuple[Tensor, Tensor]
"""cu_seqlens_q and cu_seqlens_k, int32 [blocks + 1]."""
Longest = tuple[int, int]
"""max_seqlen_q and max_seqlen_k."""


def forward(
    kernel: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    longest: Longest,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its own block, by one kernel call.

    Args:
        kernel: a variable-length one.
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
    out, lse = KERNELS[kernel][0](q, k, v, bounds, longest, causal, scale)
    return out, lse.t()


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
    kernel: Attention,
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
        kernel: a variable-length one.
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
    run = KERNELS[kernel][1]
    dq, dk, dv = run(grad.contiguous(), q, k, v, out, lse.t().contiguous(), bounds, longest, causal, scale)
    return dq, dk, dv


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


def _flash_attn_3(name: str, gives: dict[str, Any]) -> Any:
    """Call a function of flash_attn_interface by names; what else it wants without a default is None."""
    function = getattr(importlib.import_module("flash_attn_interface"), name)
    takes = parameters(function)
    if "is_causal" in takes:
        gives["is_causal"] = gives.pop("causal")
    return function(**{one: None for one, default in takes.items() if not default} | gives)


def _flash_attn_3_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: Longest, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    gives: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        **_limits(bounds, longest),
        "softmax_scale": scale,
        "causal": causal,
    }
    out, lse, *_ = _flash_attn_3("_flash_attn_forward", gives)
    return out, lse


def _flash_attn_3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bounds: Bounds, longest: Longest, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    gives = {"dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    _flash_attn_3("_flash_attn_backward", gives | _limits(bounds, longest) | {"softmax_scale": scale, "causal": causal})
    return dq, dk, dv


def _limits(bounds: Bounds, longest: Longest) -> dict[str, Any]:
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    return dict(zip(names, (*bounds, *longest), strict=True))


KERNELS: dict[Attention, tuple[Callable[..., Any], Callable[..., Any]]] = {
    Attention.TORCH_FLASH: (_torch_forward, _torch_backward),
    Attention.FLASH_ATTN_2: (_flash_attn_forward, _flash_attn_backward),
    Attention.FLASH_ATTN_3: (_flash_attn_3_forward, _flash_attn_3_backward),
}
"""Variable-length kernel -> (forward, backward)."""
