"""Flash attention on CUDA: blocks of any lengths in one call, with log-sum-exp. Written, never run.

flash-attn's variable-length kernels where that package is installed, else the ones that PyTorch ships.
checks/kernels.py holds both against the plain twins; it is how a machine with a GPU finds out whether they may
be trusted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("flash_attn") is not None
"""flash-attn can be imported."""

Bounds = tuple[Tensor, Tensor]
Longest = tuple[int, int]


def fits(q: Tensor) -> bool:
    """True where these kernels can serve: CUDA, half precision, heads that are a multiple of 8 and at most 256 wide."""
    return q.is_cuda and q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: Longest, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its block.

    Args:
        q: [queries, h, d]; k and v: [keys, g, d].
        k: see q.
        v: see q.
        bounds: int32 [blocks + 1] twice, where the blocks begin among queries and keys.
        longest: queries and keys of the longest block.
        causal: query i of a block sees its keys 0..i.
        scale: factor on the scores.

    Returns:
        output [queries, h, d] and log-sum-exp [queries, h], float32.
    """
    run = _flash_attn_forward if INSTALLED else _torch_forward
    out, lse = run(q, k, v, bounds, longest, causal, scale)
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
    """The blocks' shares of the gradients, from the output and log-sum-exp [queries, h] of the whole row.

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
    # The random state is read with dropout only.
    none = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _aten._flash_attention_backward(
        grad, q, k, v, out, lse, *bounds, *longest, 0.0, causal, none, none, scale=scale
    )
    return dq, dk, dv


def _options(causal: bool, scale: float) -> dict[str, Any]:
    """What flash-attn's functions want to be told (names and defaults of flash-attn 2.7.1 to 2.8)."""
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

    shares = tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, v))
    _flash_attn_varlen_backward(
        grad, q, k, v, out, lse, *shares, *bounds, *longest, **_options(causal, scale), deterministic=False
    )
    dq, dk, dv = shares
    return dq, dk, dv


FLASH_ATTN = "flash-attn varlen"
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch flash varlen": (_torch_forward, _torch_backward),
    FLASH_ATTN: (_flash_attn_forward, _flash_attn_backward),
}
"""Forward and backward by name; the second is chosen where it is installed."""
