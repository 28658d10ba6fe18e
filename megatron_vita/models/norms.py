"""RMSNorm and LayerNorm modules for megatron-core's layer specs, without Apex or Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vita import kernels

_SMALL = 8192
"""Numbers below which one call of PyTorch's composite is faster on CPU; above, fewer passes over memory are."""


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension; statistics in float32 or wider.

    torch.nn.RMSNorm is fused on CUDA only; on CPU this class uses an autograd function with fewer passes over memory.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each tensor rank sees 1/tp of the tokens: megatron-core all-reduces the gradients of marked parameters.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        if kernels.on(x.device).fused_norm:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """RMSNorm over each head (q_layernorm and k_layernorm of Qwen3); x is [tokens, 1, heads, d], weight [d].

    A tensor rank has all tokens of some heads, with or without sequence parallelism, so its gradient is partial:
    `partial_over_tp` makes parallel/grads.py sum it. (megatron-core selects q_layernorm and k_layernorm by name, which
    would also sum the tower's norms of these names, whose gradients are complete.)
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.partial_over_tp = True  # type: ignore[attr-defined]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., n] without gradients, with the roundings of `RMSNorm`."""
    if kernels.on(x.device).fused_norm or (x.dtype == torch.float32 and x.numel() < _SMALL):
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return _normed(x, eps)[0] * weight


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean of squares + eps) in the dtype of x, and the factor [..., 1] in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        d_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        d_normed = (grad * weight).to(scale.dtype)
        along = (d_normed * normed).mean(-1, keepdim=True)
        return torch.addcmul(d_normed, normed, along, value=-1).mul_(scale).to(grad.dtype), d_weight, None


class LayerNorm(torch.nn.LayerNorm):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
