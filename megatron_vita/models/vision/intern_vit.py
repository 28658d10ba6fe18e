"""InternViT: a class token, learned positions, pre-norm blocks with layer scale, no norm at the end.

The tower is small beside the decoder, so every rank of a tensor x context group holds all of it and encodes its share
of the tiles. Inside it nothing is split: its process groups have one rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_vita.config import IMAGE_NORMS, VisionConfig
from megatron_vita.models.layer_specs import tower_spec


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


def undrawn(weight: Tensor) -> None:
    """An init method that leaves the weight alone: fresh weights are drawn by name once the model stands."""


def tower_config(vision: VisionConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's settings for the tower: nothing split, its own epsilon, exact GELU, biases everywhere."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.norm_epsilon,
        normalization="LayerNorm",
        activation_func=F.gelu,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        init_method=undrawn,
        output_layer_init_method=undrawn,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


class InternViT(MegatronModule):
    """uint8 tiles -> patch states of the last block, class token dropped."""

    def __init__(self, vision: VisionConfig, *, dtype: torch.dtype, implementation: str, collection: Any) -> None:
        config = tower_config(vision, dtype)
        super().__init__(config=config)
        self.vision = vision
        hidden, patch = vision.hidden_size, vision.patch_size
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden, dtype=dtype))
        self.position_embeddings = nn.Embedding(vision.num_patches + 1, hidden, dtype=dtype)
        # Holds the weights under their names; cutting patches first and multiplying is the same and faster.
        self.conv1 = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch, dtype=dtype)
        self.decoder = TransformerBlock(
            config=config,
            spec=tower_spec(implementation, vision.num_layers, LayerScaleLayer),
            post_layer_norm=False,
            pg_collection=collection,
        )
        mean, std = (torch.tensor(one, dtype=torch.float32) for one in IMAGE_NORMS[vision.image_norm])
        self.register_buffer("_mean", mean.view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", std.view(3, 1, 1) * 255, persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, S, S], n > 0 -> [n, patches, h]."""
        pixels = (tiles.float() - self._mean) / self._std
        patches = F.linear(self._cut(pixels).to(self.conv1.weight.dtype), self.conv1.weight.flatten(1), self.conv1.bias)
        states = torch.cat([self.class_token.expand(len(tiles), -1, -1), patches], dim=1)
        states = (states + self.position_embeddings.weight).transpose(0, 1).contiguous()  # [1 + patches, n, h]
        states = self.decoder(hidden_states=states, attention_mask=None)
        return states[1:].transpose(0, 1)

    def _cut(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, patches, 3 P P], each patch as the convolution's kernel reads it."""
        size = self.vision.patch_size
        side = self.vision.image_size // size
        cut = pixels.view(-1, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(len(pixels), side * side, 3 * size * size)
