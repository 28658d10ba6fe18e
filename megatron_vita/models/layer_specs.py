"""Which classes a layer is made of: megatron-core's own (`local`), or Transformer Engine's (`te`).

Both give the same checkpoint keys: `local` keeps its norms beside the linears and maps their names to Transformer
Engine's, which keeps them inside.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vita.config import VisionConfig
from megatron_vita.errors import ConfigError
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.norms import HeadRMSNorm, LayerNorm, RMSNorm
from megatron_vita.models.vision.layers import LayerScaleLayer, WidthRMSNorm
from megatron_vita.parallel.attention import TowerCoreAttention, VitaCoreAttention

TE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Local names of a layer's norms -> their names in checkpoints, which are Transformer Engine's."""


def choose_implementation(wanted: str) -> str:
    """`local` or `te`, from model.transformer_impl.

    Raises:
        ConfigError: `te` is asked for and does not import.
    """
    found = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "te" and not found:
        raise ConfigError(
            "model.transformer_impl=te, but transformer_engine cannot be imported. Install the `cuda` extra, "
            "or use local."
        )
    return "te" if wanted == "te" or (wanted == "auto" and found) else "local"


def decoder_spec(implementation: str, layers: int, *, qk_layernorm: bool = False) -> TransformerBlockSubmodules:
    """The decoder's layers on one pipeline stage: RMSNorm, causal attention within documents, SwiGLU.

    Args:
        implementation: `local` or `te`.
        layers: how many.
        qk_layernorm: norms on each query and key head.
    """
    final_norm: Any = RMSNorm
    if implementation == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec()
        layer.submodules.self_attention.submodules.core_attention = VitaCoreAttention
        final_norm = TENorm
    else:
        layer = _local_layer(TransformerLayer, RMSNorm, VitaCoreAttention, AttnMaskType.causal, SwiGLU)
    if qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = HeadRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def tower_spec(implementation: str, vision: VisionConfig) -> TransformerBlockSubmodules:
    """The tower's layers up to the selected one: attention of every patch to every other; no norm after the last."""
    layer_class = LayerScaleLayer if vision.family.layer_scale else TransformerLayer
    if implementation == "te":
        layer = get_gpt_layer_with_transformer_engine_spec()  # its norms follow config.normalization
        layer.module = layer_class
        layer.submodules.self_attention.submodules.core_attention = TowerCoreAttention
        layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    else:
        norm = RMSNorm if vision.normalization == "RMSNorm" else LayerNorm
        layer = _local_layer(layer_class, norm, TowerCoreAttention, AttnMaskType.no_mask)
    attention = layer.submodules.self_attention.submodules
    if not vision.add_qkv_bias:
        attention.linear_qkv = _without_bias(attention.linear_qkv)
    if vision.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = WidthRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * vision.built_layers, layer_norm=None)


@functools.cache
def _without_bias(linear: Any) -> type:
    """A linear layer's class that takes no bias whatever it is told: megatron-core has one switch for all linears."""

    class WithoutBias(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def _local_layer(
    layer_class: type, norm: type, core_attention: type, mask: Any, activation: type | None = None
) -> ModuleSpec:
    return ModuleSpec(
        module=layer_class,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=activation
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=TE_NAMES,
        ),
    )
