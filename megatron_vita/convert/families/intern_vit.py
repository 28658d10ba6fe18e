"""InternViT-300M and -6B: configuration and names, as OpenGVLab's remote code and as transformers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import VisionConfig
from megatron_vita.convert.hf_config import (
    check_not_quantised,
    choice,
    flag,
    require,
    tower_sizes,
)
from megatron_vita.convert.rules import Rule, grouped_qkv, joint_qkv, rename
from megatron_vita.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Names:
    """How one publisher names the tensors."""

    class_token: str
    position: str
    patch: str
    layer: str
    """Prefix of layer {n}."""
    joint: str | None
    """One tensor [Q; K; V], or none where the three are apart."""
    separate: tuple[str, str, str]
    query_norm: str
    key_norm: str
    proj: str
    norm1: str
    norm2: str
    scale1: str
    scale2: str


REMOTE = Names(
    class_token="embeddings.class_embedding",
    position="embeddings.position_embedding",
    patch="embeddings.patch_embedding",
    layer="encoder.layers.{n}.",
    joint="attn.qkv",
    separate=("", "", ""),
    query_norm="attn.q_norm",
    key_norm="attn.k_norm",
    proj="attn.proj",
    norm1="norm1",
    norm2="norm2",
    scale1="ls1",
    scale2="ls2",
)
"""OpenGVLab's remote code, `model_type` intern_vit_6b; Long-VITA uses the same."""

NATIVE = Names(
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    layer="encoder.layer.{n}.",
    joint=None,
    separate=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    query_norm="attention.q_norm",
    key_norm="attention.k_norm",
    proj="attention.projection_layer",
    norm1="layernorm_before",
    norm2="layernorm_after",
    scale1="lambda_1",
    scale2="lambda_2",
)
"""transformers' own InternVL classes, `model_type` internvl_vision."""

MODEL_TYPES = {"intern_vit_6b": REMOTE, "internvl_vision": NATIVE}
_NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_NATIVE_QK_EPSILON = 1e-6
"""transformers' native classes have it written in the code of the query and key norms."""


def kind_of(config: Mapping[str, Any]) -> str | None:
    """model_type; remote code's may be left out, and its own settings tell it. None for any other tower."""
    kind = config.get("model_type", "intern_vit_6b" if "qkv_bias" in config else None)
    return kind if isinstance(kind, str) and kind in MODEL_TYPES else None


def read_config(config: Mapping[str, Any], where: str) -> tuple[VisionConfig, Names]:
    """A tower's config.json (or vision_config, or Long-VITA's `visual`) as a VisionConfig, and its tensors' names.

    Raises:
        CheckpointError: an unknown kind, or a feature that the tower cannot do.
    """
    names = MODEL_TYPES[choice(config, "model_type", MODEL_TYPES, kind_of(config), where)]
    check_not_quantised(config, where)
    norm = choice(config, "norm_type", _NORMS, "layer_norm" if names is NATIVE else "rms_norm", where)
    require(config, "hidden_act", "gelu", "gelu", where)
    require(config, "num_channels", 3, 3, where)
    if names is NATIVE:
        bias, qk_norm = flag(config, "attention_bias", False, where), flag(config, "use_qk_norm", False, where)
        require(config, "use_mean_pooling", True, True, where)
        require(config, "use_mask_token", False, False, where)
        require(config, "use_absolute_position_embeddings", True, True, where)
        if qk_norm:
            require(config, "layer_norm_eps", _NATIVE_QK_EPSILON, None, where)
    else:
        bias, qk_norm = flag(config, "qkv_bias", False, where), flag(config, "qk_normalization", True, where)
    try:
        vision = VisionConfig(
            normalization=_NORMS[norm],
            add_qkv_bias=bias,
            qk_layernorm=qk_norm,
            **tower_sizes(config, where),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return vision, names


def read_tower(
    config: Mapping[str, Any], where: str
) -> tuple[VisionConfig, Callable[[LazyTensors], tuple[LazyTensors, list[Rule]]]]:
    """A tower alone: its settings, and the rules for all tensors of its folder."""
    vision, names = read_config(config, where)
    return vision, lambda source: (source, rules(vision, names))


def write_config(vision: VisionConfig, names: Names, dtype: str) -> dict[str, Any]:
    """The tower as a config.json of either publisher.

    Raises:
        CheckpointError: the publisher's classes cannot hold the tower; says why.
    """
    check_exportable(vision, names)
    norm = next(hf for hf, mcore in _NORMS.items() if mcore == vision.normalization)
    common = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": "gelu",
        "norm_type": norm,
        "layer_norm_eps": vision.norm_epsilon,
        "num_channels": 3,
        "initializer_range": vision.init_method_std,
        "attention_dropout": 0.0,
        "dtype": dtype,
    }
    if names is NATIVE:
        return {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            **common,
            "image_size": [vision.image_size, vision.image_size],
            "patch_size": [vision.patch_size, vision.patch_size],
            # Left out, stock code drops all q, k and v biases with no more than a remark.
            "attention_bias": vision.add_qkv_bias,
            "use_qk_norm": vision.qk_layernorm,
            "use_mean_pooling": True,  # means: no norm after the last layer, which InternViT has not
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": vision.layer_scale_init,
            "hidden_dropout_prob": 0.0,
            "projection_dropout": 0.0,
        }
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **common,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "qkv_bias": vision.add_qkv_bias,
        "qk_normalization": vision.qk_layernorm,
        "initializer_factor": vision.layer_scale_init,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "use_flash_attn": True,
    }


def check_exportable(vision: VisionConfig, names: Names) -> None:
    """Reject a tower that a publisher's classes cannot hold.

    Raises:
        CheckpointError: another family; states of a block before the last; or norms of another epsilon than its.
    """
    if vision.model_type != "intern_vit":
        raise CheckpointError(
            f"model.vision.model_type={vision.model_type}: this format's tower is an InternViT, and no class of "
            "transformers joins another by pixel shuffle. Serve the checkpoint with megatron_vita, or export its "
            "decoder alone with --format llm."
        )
    if vision.selected_layer != -1:
        raise CheckpointError(
            f"model.vision.select_layer={vision.selected_layer}: an InternViT gives its last block's states in this "
            "format. Export a model that was trained so."
        )
    if names is NATIVE and vision.qk_layernorm and vision.norm_epsilon != _NATIVE_QK_EPSILON:
        raise CheckpointError(
            f"model.vision.norm_epsilon={vision.norm_epsilon}, but in transformers the query and key norms always have "
            f"{_NATIVE_QK_EPSILON}. Such a model cannot be exported in this format; --format long_vita can hold it."
        )


def rules(vision: VisionConfig, names: Names, prefix: str = "") -> list[Rule]:
    """Every tensor of the tower; `prefix` begins its Hugging Face names."""
    width, inner, side = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    heads, positions = vision.num_attention_heads, vision.num_patches + 1
    top = "vision_model."
    table = [
        rename(top + "class_token", prefix + names.class_token, (1, 1, width)),
        rename(
            top + "position_embeddings.weight",
            prefix + names.position,
            (positions, width),
            hf_shape=(1, positions, width),
        ),
        rename(top + "conv1.weight", f"{prefix}{names.patch}.weight", (width, 3, side, side)),
        rename(top + "conv1.bias", f"{prefix}{names.patch}.bias", (width,)),
    ]
    for layer in range(vision.num_layers):
        mcore, hf = f"{top}decoder.layers.{layer}.", prefix + names.layer.format(n=layer)
        for kind, columns in (("weight", width), ("bias", None)):
            target = f"{mcore}self_attention.linear_qkv.{kind}"
            if kind == "bias" and not vision.add_qkv_bias:
                pass
            elif names.joint:
                source = f"{hf}{names.joint}.{kind}"
                table.append(joint_qkv(target, source, heads=heads, head_dim=width // heads, columns=columns))
            else:
                parts = [f"{hf}{part}.{kind}" for part in names.separate]
                table.append(
                    grouped_qkv(target, parts, heads=heads, groups=heads, head_dim=width // heads, columns=columns)
                )
            for one, two, rows, inputs in (
                ("self_attention.linear_proj", names.proj, width, width),
                ("mlp.linear_fc1", "mlp.fc1", inner, width),
                ("mlp.linear_fc2", "mlp.fc2", width, inner),
            ):
                shape = (rows, inputs) if kind == "weight" else (rows,)
                table.append(rename(f"{mcore}{one}.{kind}", f"{hf}{two}.{kind}", shape))
            for one, two in (
                ("self_attention.linear_qkv.layer_norm", names.norm1),
                ("mlp.linear_fc1.layer_norm", names.norm2),
            ):
                if kind == "weight" or vision.normalization == "LayerNorm":
                    table.append(rename(f"{mcore}{one}_{kind}", f"{hf}{two}.{kind}", (width,)))
        if vision.qk_layernorm:
            for part, hf_norm in (("q", names.query_norm), ("k", names.key_norm)):
                one, two = f"{mcore}self_attention.{part}_layernorm.weight", f"{hf}{hf_norm}.weight"
                table.append(rename(one, two, (width,)))
        table.append(rename(mcore + "ls1", hf + names.scale1, (width,)))
        table.append(rename(mcore + "ls2", hf + names.scale2, (width,)))
    return table
