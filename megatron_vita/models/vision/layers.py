"""What InternViT's blocks have and megatron-core's lack: layer scale, and a norm over all heads of queries or keys."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class LayerScaleLayer(TransformerLayer):
    """h += ls1 * (attention + bias); h += ls2 * (MLP + bias): the scale multiplies after the bias."""

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
    """RMSNorm over all heads of a token together, for megatron-core's query and key norm sockets.

    megatron-core's own norms each head by itself. In a tensor-parallel tower a rank holds some of the heads: the mean
    of squares is then taken over the tensor ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """`hidden_size` is one head's, as the socket passes it."""
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
            # Summed forward; and backward, where each rank knows what its own heads made of the sum.
            squares = mappings.reduce_from_tensor_model_parallel_region(squares)
            squares = mappings.copy_to_tensor_model_parallel_region(squares)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing of its own: VitaModel stores the tower by its parameters' marks."""
        return {}
