"""Norms that megatron-core's layer specs can build: with sequence parallelism, without Apex or Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight; statistics in float32 or wider.

    torch has a fused kernel on CUDA alone; on CPU its backward is a chain of a dozen passes, ours of five.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each tensor rank sees only its tokens: megatron-core sums marked gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        if x.is_cuda:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each head by itself, for megatron-core's query and key norm sockets (Qwen3).

    A tensor rank has some of the heads and all tokens, with sequence parallelism or without: it has part of the
    gradient, which parallel/grads.py sums. (megatron-core would do so by the parameter's name, and with it sum a second
    time what a tower's norms of the same name have.)
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.partial_over_tp = True  # type: ignore[attr-defined]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (wide * scale).to(x.dtype)
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
    """(x - mean) / std * weight + bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
