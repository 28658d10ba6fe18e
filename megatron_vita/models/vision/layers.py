"""InternViT's additions to megatron-core's transformer layer: LayerScale, and QK norm over all heads together."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class LayerScaleLayer(TransformerLayer):
    """TransformerLayer with LayerScale: h += ls1 * (attention + bias), then h += ls2 * (MLP + bias)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.self_attn_bda = lambda training, fused: lambda out, residual, dropout: _scaled(out, residual, self.ls1)
        self.mlp_bda = lambda training, fused: lambda out, residual, dropout: _scaled(out, residual, self.ls2)


def _scaled(out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, scale: Tensor) -> Tensor:
    out, bias = out_with_bias
    return torch.addcmul(residual, out if bias is None else out + bias, scale)


class WidthRMSNorm(nn.Module):
    """RMSNorm over all heads of a token, as q_layernorm or k_layernorm of megatron-core's SelfAttention (InternViT-6B).

    megatron-core's QK norm is per head. In a tensor-parallel tower a rank holds some of the heads: the sum of squares
    is all-reduced over the tensor ranks, forward and backward.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """Create this rank's shard of the weight.

        Args:
            config: the tower's TransformerConfig.
            hidden_size: size of one head, as SelfAttention passes it.
            eps: epsilon.
        """
        super().__init__()
        split = config.tensor_model_parallel_size
        self.width = hidden_size * config.num_attention_heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.width // split, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = split > 1  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[patches, tiles, local heads, d] -> the same shape; statistics in float32 or wider."""
        wide = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        if self.weight.shape[0] < self.width:
            # All-reduce in the forward (reduce) and of the gradient in the backward (copy).
            squares = mappings.reduce_from_tensor_model_parallel_region(squares)
            squares = mappings.copy_to_tensor_model_parallel_region(squares)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Empty: VitaModel.sharded_state_dict stores the tower's parameters."""
        return {}
