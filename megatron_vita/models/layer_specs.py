"""megatron-core layer specs of decoder and vision tower, with megatron-core's layers (`local`) or Transformer Engine's.

Both implementations have the same checkpoint keys: Transformer Engine fuses a norm with the linear layer behind it;
`local` has separate norm modules and maps their names to Transformer Engine's.
"""

from __future__ import annotations

import functools
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
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.norms import HeadRMSNorm, LayerNorm, RMSNorm
from megatron_vita.models.vision.layers import LayerScaleLayer, WidthRMSNorm
from megatron_vita.parallel.attention import TowerCoreAttention, VitaCoreAttention

TE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Prefixes of norm parameters in a `local` layer -> prefixes in checkpoints, which are Transformer Engine's."""


def decoder_spec(implementation: str, layers: int, *, qk_layernorm: bool = False) -> TransformerBlockSubmodules:
    """Layer specs of the decoder on one pipeline stage: RMSNorm, causal attention within documents, SwiGLU.

    Args:
        implementation: `local` or `te`.
        layers: number of layers of the stage.
        qk_layernorm: RMSNorm on every query and key head (Qwen3).
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
        _add_qk_norm(layer.submodules.self_attention, HeadRMSNorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def tower_spec(implementation: str, vision: VisionConfig) -> TransformerBlockSubmodules:
    """Layer specs of the vision tower, up to the selected layer: bidirectional attention; no norm after the last layer.

    Args:
        implementation: `local` or `te`.
        vision: settings of the tower.
    """
    layer_class = LayerScaleLayer if vision.family.layer_scale else TransformerLayer
    if implementation == "te":
        layer = get_gpt_layer_with_transformer_engine_spec()  # its norms follow config.normalization
        layer.module = layer_class
        layer.submodules.self_attention.submodules.core_attention = TowerCoreAttention
        layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    else:
        norm = RMSNorm if vision.normalization == "RMSNorm" else LayerNorm
        layer = _local_layer(layer_class, norm, TowerCoreAttention, AttnMaskType.no_mask)
    attention = layer.submodules.self_attention
    if not vision.add_qkv_bias:
        attention.submodules.linear_qkv = _without_bias(attention.submodules.linear_qkv)
    if vision.qk_layernorm:
        _add_qk_norm(attention, WidthRMSNorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * vision.built_layers, layer_norm=None)


class QKNormAttention(SelfAttention):
    """megatron-core's SelfAttention with a norm on its queries and one on its keys, of class `qk_norm`.

    They replace what the constructor has built, and are not named in its submodules: megatron-core 0.19 refuses them
    there unless TransformerConfig.qk_layernorm is set. With that set, every release sums the gradients of parameters
    named q_layernorm or k_layernorm over the tensor ranks, the tower's too, which are complete.
    """

    def __init__(self, *args: Any, qk_norm: type, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("q_layernorm", "k_layernorm"):
            norm = qk_norm(self.config, self.hidden_size_per_attention_head, self.config.layernorm_epsilon)
            setattr(self, name, norm)


def _add_qk_norm(attention: ModuleSpec, norm: type) -> None:
    attention.module = QKNormAttention
    attention.params = {**attention.params, "qk_norm": norm}


@functools.cache
def _without_bias(linear: Any) -> type:
    """Subclass of a linear layer that ignores `bias`: megatron-core's add_bias_linear applies to all linear layers."""

    class WithoutBias(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=False, **kwargs)

    return WithoutBias


def _local_layer(
    layer_class: type, norm: type, core_attention: type, mask: Any, activation: type | None = None
) -> ModuleSpec:
    """Spec of one transformer layer of megatron-core's own modules."""
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
