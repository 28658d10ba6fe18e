"""The vision tower (ViT encoder): patch embedding, learned position embedding, pre-norm transformer blocks.

One module covers every family of config/vision.py. By default the tower is replicated on every rank of a tensor x
context group and each rank encodes different tiles; its process groups then contain one rank. With
model.vision.tensor_parallel its blocks are split over the tensor ranks, which encode every tile together.
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
from megatron_vita.device import torch_device
from megatron_vita.models.activations import quick_gelu
from megatron_vita.models.layer_specs import tower_spec
from megatron_vita.models.norms import LayerNorm

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


def no_init(weight: Tensor) -> None:
    """megatron-core init_method that does nothing: models/build.py initialises all weights by name afterwards."""


def tower_config(vision: VisionConfig, dtype: torch.dtype, tensor_parallel_size: int = 1) -> TransformerConfig:
    """megatron-core's TransformerConfig of the tower.

    All linear layers have biases; model.vision.add_qkv_bias=false removes those of queries, keys and values in
    layer_specs.py.

    Args:
        vision: settings of the tower.
        dtype: of the parameters.
        tensor_parallel_size: ranks that the blocks are split over.
    """
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
        use_cpu_initialization=False,  # as models/build.py does, and for its reason
        init_method=no_init,
        output_layer_init_method=no_init,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


class VisionTower(MegatronModule):
    """uint8 tiles -> hidden states of the selected layer (model.vision.select_layer), without the class token."""

    def __init__(self, vision: VisionConfig, *, dtype: torch.dtype, implementation: str, collection: Any) -> None:
        """Build the modules, weights uninitialised.

        Args:
            vision: settings of the tower.
            dtype: of the parameters.
            implementation: layer classes, `local` or `te`.
            collection: ProcessGroupCollection of the blocks: Groups.tower_collection or split_tower_collection.
        """
        config = tower_config(vision, dtype, collection.tp.size())
        super().__init__(config=config)
        self.vision = vision
        self.split = config.tensor_model_parallel_size > 1
        """The blocks are tensor-parallel: all tensor ranks must call `forward` with the same tiles."""
        hidden, patch, family = vision.hidden_size, vision.patch_size, vision.family
        if family.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, hidden, dtype=dtype))
        self.position_embeddings = nn.Embedding(vision.num_positions, hidden, dtype=dtype)
        # Holds the weights under their checkpoint names; `forward` uses an equal, faster matrix product.
        self.conv1 = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch, bias=family.patch_bias, dtype=dtype)
        if family.pre_norm:
            self.ln_pre = LayerNorm(config, hidden, vision.norm_epsilon)
        self.decoder = TransformerBlock(
            config=config, spec=tower_spec(implementation, vision), post_layer_norm=False, pg_collection=collection
        )
        if vision.post_norm:
            self.ln_post = LayerNorm(config, hidden, vision.norm_epsilon)
        mean, std = (
            torch.tensor(one, dtype=torch.float32, device=torch_device()) for one in IMAGE_NORMS[vision.image_norm]
        )
        # Not buffers: megatron-core's Float16Module would cast them to bfloat16.
        self._mean, self._std = mean.view(3, 1, 1) * 255, std.view(3, 1, 1) * 255

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, S, S], n > 0 -> patch states [n, patches, tower width] in the dtype of the parameters."""
        family = self.vision.family
        pixels = self.normalise(tiles)
        patches = self._patchify(pixels).to(self.conv1.weight.dtype)
        states = F.linear(patches, self.conv1.weight.flatten(1), self.conv1.bias)
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
        """uint8 [n, 3, S, S] -> float32 of the same shape, (x / 255 - mean) / std as model.vision.image_norm says."""
        self._mean, self._std = self._mean.to(tiles.device), self._std.to(tiles.device)
        return (tiles.float() - self._mean) / self._std

    def _patchify(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, patches, 3 * P * P] for patch size P, each patch in the order of the conv weight."""
        size = self.vision.patch_size
        side = self.vision.image_size // size
        patches = pixels.view(-1, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(len(pixels), side * side, 3 * size * size)
