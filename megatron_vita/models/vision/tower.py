"""The vision tower: patches, learned positions, pre-norm blocks. One module for every family of config/vision.py.

A tower that is small beside the decoder stands whole on every rank of a tensor x context group, and each encodes its
share of the tiles: inside it nothing is split, its process groups have one rank. With model.vision.tensor_parallel its
blocks are split over the tensor ranks by megatron-core's own layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vita.config import IMAGE_NORMS, VisionConfig
from megatron_vita.models.activations import quick_gelu
from megatron_vita.models.layer_specs import tower_spec
from megatron_vita.models.norms import LayerNorm

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


def undrawn(weight: Tensor) -> None:
    """An init method that leaves the weight alone: fresh weights are drawn by name once the model stands."""


def tower_config(vision: VisionConfig, dtype: torch.dtype, tensor_parallel_size: int = 1) -> TransformerConfig:
    """megatron-core's settings for the tower: its own epsilon and activation, biases everywhere (but where
    add_qkv_bias takes those of queries, keys and values away, see layer_specs.py)."""
    return TransformerConfig(
        num_layers=vision.built_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        tensor_model_parallel_size=tensor_parallel_size,
        layernorm_epsilon=vision.norm_epsilon,
        normalization=vision.normalization,
        activation_func=ACTIVATIONS[vision.family.activation],
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


class VisionTower(MegatronModule):
    """uint8 tiles -> patch states of the selected block, class token dropped."""

    def __init__(self, vision: VisionConfig, *, dtype: torch.dtype, implementation: str, collection: Any) -> None:
        """Build without weights.

        Args:
            vision: the tower's settings.
            dtype: of the parameters.
            implementation: `local` or `te`.
            collection: process groups that the blocks are split over: one rank, or the tensor-parallel ranks.
        """
        config = tower_config(vision, dtype, collection.tp.size())
        super().__init__(config=config)
        self.vision = vision
        self.split = config.tensor_model_parallel_size > 1
        """The blocks are split over ranks, which encode each tile together."""
        hidden, patch, family = vision.hidden_size, vision.patch_size, vision.family
        if family.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, hidden, dtype=dtype))
        self.position_embeddings = nn.Embedding(vision.num_positions, hidden, dtype=dtype)
        # Holds the weights under their names; cutting patches first and multiplying is the same and faster.
        self.conv1 = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch, bias=family.patch_bias, dtype=dtype)
        if family.pre_norm:
            self.ln_pre = LayerNorm(config, hidden, vision.norm_epsilon)
        self.decoder = TransformerBlock(
            config=config, spec=tower_spec(implementation, vision), post_layer_norm=False, pg_collection=collection
        )
        if vision.post_norm:
            self.ln_post = LayerNorm(config, hidden, vision.norm_epsilon)
        mean, std = (torch.tensor(one, dtype=torch.float32) for one in IMAGE_NORMS[vision.image_norm])
        # No buffers: megatron-core's Float16Module would round them to bfloat16.
        self._mean, self._std = mean.view(3, 1, 1) * 255, std.view(3, 1, 1) * 255

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, S, S], n > 0 -> [n, patches, h]."""
        family = self.vision.family
        pixels = self.normalise(tiles)
        states = F.linear(self._cut(pixels).to(self.conv1.weight.dtype), self.conv1.weight.flatten(1), self.conv1.bias)
        if family.class_token:
            states = torch.cat([self.class_token.expand(len(tiles), -1, -1), states], dim=1)
        states = (states + self.position_embeddings.weight).transpose(0, 1).contiguous()  # [positions, n, h]
        if family.pre_norm:
            states = self.ln_pre(states)
        states = self.decoder(hidden_states=states, attention_mask=None)
        if self.vision.post_norm:
            states = self.ln_post(states)
        return states[int(family.class_token) :].transpose(0, 1)

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] -> float32, each channel with the mean and deviation of model.vision.image_norm."""
        self._mean, self._std = self._mean.to(tiles.device), self._std.to(tiles.device)
        return (tiles.float() - self._mean) / self._std

    def _cut(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, patches, 3 P P], each patch as the convolution's kernel reads it."""
        size = self.vision.patch_size
        side = self.vision.image_size // size
        cut = pixels.view(-1, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(len(pixels), side * side, 3 * size * size)
