"""InternViT: configuration and names, as OpenGVLab's remote code and as transformers write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import VisionConfig
from megatron_vita.convert.hf_config import integer, number, refuse, require, square
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
    proj="attention.projection_layer",
    norm1="layernorm_before",
    norm2="layernorm_after",
    scale1="lambda_1",
    scale2="lambda_2",
)
"""transformers' own InternVL classes, `model_type` internvl_vision."""

MODEL_TYPES = {"intern_vit_6b": REMOTE, "internvl_vision": NATIVE}


def read_config(config: Mapping[str, Any], where: str) -> tuple[VisionConfig, Names]:
    """A tower's config.json (or vision_config, or Long-VITA's `visual`) as ours, and how its tensors are named.

    Raises:
        CheckpointError: an unknown kind, or a feature that the tower cannot do (RMSNorm, query/key norms, no biases).
    """
    kind = config.get("model_type", "intern_vit_6b" if "qkv_bias" in config else None)
    if kind not in MODEL_TYPES:
        raise refuse(where, "model_type", kind, f"an InternViT: {' or '.join(MODEL_TYPES)}")
    names = MODEL_TYPES[kind]
    require(config, "norm_type", "layer_norm", "layer_norm" if names is NATIVE else "rms_norm", where)
    require(config, "hidden_act", "gelu", "gelu", where)
    require(config, "num_channels", 3, 3, where)
    if names is NATIVE:
        require(config, "attention_bias", True, False, where)
        require(config, "use_qk_norm", False, False, where)
        require(config, "use_mean_pooling", True, True, where)
        require(config, "use_mask_token", False, False, where)
        require(config, "use_absolute_position_embeddings", True, True, where)
    else:
        require(config, "qkv_bias", True, False, where)
        require(config, "qk_normalization", False, True, where)
    try:
        vision = VisionConfig(
            num_layers=integer(config, "num_hidden_layers", where),
            hidden_size=integer(config, "hidden_size", where),
            ffn_hidden_size=integer(config, "intermediate_size", where),
            num_attention_heads=integer(config, "num_attention_heads", where),
            norm_epsilon=number(config, "layer_norm_eps", where),
            image_size=square(config, "image_size", where),
            patch_size=square(config, "patch_size", where),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return vision, names


def write_config(vision: VisionConfig, names: Names, dtype: str) -> dict[str, Any]:
    """Our tower as a config.json of either publisher.

    Raises:
        CheckpointError: a tower that is not written yet: another family, RMSNorm, query/key norms, or no biases.
    """
    other = dataclasses.replace(vision, normalization="LayerNorm", add_qkv_bias=True, qk_layernorm=False)
    if vision.model_type != "intern_vit" or other != vision or vision.selected_layer != -1:
        raise CheckpointError(
            f"model.vision: a {vision.model_type} tower with these settings cannot be written for Hugging Face yet. "
            "Towers like InternViT-300M can."
        )
    common = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
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
            "attention_bias": True,  # the default drops all q, k and v biases with no more than a remark
            "use_qk_norm": False,
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
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": vision.layer_scale_init,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "use_flash_attn": True,
    }


def rules(vision: VisionConfig, names: Names, prefix: str = "") -> list[Rule]:
    """Every tensor of the tower; `prefix` is theirs."""
    width, inner, side = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    heads, positions = vision.num_attention_heads, vision.num_patches + 1
    our = "vision_model."
    table = [
        rename(our + "class_token", prefix + names.class_token, (1, 1, width)),
        rename(
            our + "position_embeddings.weight",
            prefix + names.position,
            (positions, width),
            their_shape=(1, positions, width),
        ),
        rename(our + "conv1.weight", f"{prefix}{names.patch}.weight", (width, 3, side, side)),
        rename(our + "conv1.bias", f"{prefix}{names.patch}.bias", (width,)),
    ]
    for layer in range(vision.num_layers):
        ours, theirs = f"{our}decoder.layers.{layer}.", prefix + names.layer.format(n=layer)
        for kind, columns in (("weight", width), ("bias", None)):
            target = f"{ours}self_attention.linear_qkv.{kind}"
            if names.joint:
                source = f"{theirs}{names.joint}.{kind}"
                table.append(joint_qkv(target, source, heads=heads, head_dim=width // heads, columns=columns))
            else:
                parts = [f"{theirs}{part}.{kind}" for part in names.separate]
                table.append(
                    grouped_qkv(target, parts, heads=heads, groups=heads, head_dim=width // heads, columns=columns)
                )
            for one, two, rows, inputs in (
                ("self_attention.linear_proj", names.proj, width, width),
                ("mlp.linear_fc1", "mlp.fc1", inner, width),
                ("mlp.linear_fc2", "mlp.fc2", width, inner),
            ):
                shape = (rows, inputs) if kind == "weight" else (rows,)
                table.append(rename(f"{ours}{one}.{kind}", f"{theirs}{two}.{kind}", shape))
            for one, two in (
                ("self_attention.linear_qkv.layer_norm", names.norm1),
                ("mlp.linear_fc1.layer_norm", names.norm2),
            ):
                table.append(rename(f"{ours}{one}_{kind}", f"{theirs}{two}.{kind}", (width,)))
        table.append(rename(ours + "ls1", theirs + names.scale1, (width,)))
        table.append(rename(ours + "ls2", theirs + names.scale2, (width,)))
    return table
