"""InternViT-300M and -6B: configuration and names, as OpenGVLab's remote code and as transformers write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import VisionConfig
from megatron_vita.convert.hf_config import check_not_quantised, choice, flag, require, tower_sizes
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
    qkv: str | tuple[str, str, str]
    """One tensor [Q; K; V], or three."""
    proj: str
    norms: tuple[str, str]
    """Before attention and before the MLP."""
    scales: tuple[str, str] = ("", "")
    qk_norms: tuple[str, str] = ("", "")


REMOTE = Names(
    class_token="embeddings.class_embedding",
    position="embeddings.position_embedding",
    patch="embeddings.patch_embedding",
    layer="encoder.layers.{n}.",
    qkv="attn.qkv",
    proj="attn.proj",
    norms=("norm1", "norm2"),
    scales=("ls1", "ls2"),
    qk_norms=("attn.q_norm", "attn.k_norm"),
)
"""OpenGVLab's remote code, `model_type` intern_vit_6b; Long-VITA uses the same."""

NATIVE = Names(
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    layer="encoder.layer.{n}.",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.projection_layer",
    norms=("layernorm_before", "layernorm_after"),
    scales=("lambda_1", "lambda_2"),
    qk_norms=("attention.q_norm", "attention.k_norm"),
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
    Raises CheckpointError: an unknown kind, or a feature that the tower cannot do."""
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
            normalization=_NORMS[norm], add_qkv_bias=bias, qk_layernorm=qk_norm, **tower_sizes(config, where)
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
    """The tower as a config.json of either publisher. Raises CheckpointError: the publisher's classes cannot hold the
    tower; says why."""
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
    """Reject a tower that a publisher's classes cannot hold. Raises CheckpointError: another family; states of a block
    before the last; or norms of another epsilon than its."""
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
    width, side, positions = vision.hidden_size, vision.patch_size, vision.num_patches + 1
    top, place = "vision_model.", prefix + names.position
    table = [
        rename(top + "class_token", prefix + names.class_token, (1, 1, width)),
        rename(top + "position_embeddings.weight", place, (positions, width), hf_shape=(1, positions, width)),
        rename(top + "conv1.weight", f"{prefix}{names.patch}.weight", (width, 3, side, side)),
        rename(top + "conv1.bias", f"{prefix}{names.patch}.bias", (width,)),
    ]
    for layer in range(vision.num_layers):
        mcore, hf = f"{top}decoder.layers.{layer}.", prefix + names.layer.format(n=layer)
        table += layer_rules(vision, names, mcore, hf)
        if vision.qk_layernorm:
            for part, norm in zip("qk", names.qk_norms, strict=True):
                table.append(rename(f"{mcore}self_attention.{part}_layernorm.weight", f"{hf}{norm}.weight", (width,)))
        for part, scale in zip(("ls1", "ls2"), names.scales, strict=True):
            table.append(rename(mcore + part, hf + scale, (width,)))
    return table


def layer_rules(vision: VisionConfig, names: Names, mcore: str, hf: str) -> Iterator[Rule]:
    """The tensors that a layer of every tower has: linears and the norms before them."""
    width, inner, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    sizes = {"heads": heads, "head_dim": width // heads}
    for kind, columns in (("weight", width), ("bias", None)):
        target = f"{mcore}self_attention.linear_qkv.{kind}"
        if kind == "weight" or vision.add_qkv_bias:
            if isinstance(names.qkv, str):
                yield joint_qkv(target, f"{hf}{names.qkv}.{kind}", **sizes, columns=columns)
            else:
                parts = [f"{hf}{part}.{kind}" for part in names.qkv]
                yield grouped_qkv(target, parts, **sizes, groups=heads, columns=columns)
        for one, two, rows, inputs in (
            ("self_attention.linear_proj", names.proj, width, width),
            ("mlp.linear_fc1", "mlp.fc1", inner, width),
            ("mlp.linear_fc2", "mlp.fc2", width, inner),
        ):
            yield rename(f"{mcore}{one}.{kind}", f"{hf}{two}.{kind}", (rows, inputs) if columns else (rows,))
        for one, norm in zip(("self_attention.linear_qkv", "mlp.linear_fc1"), names.norms, strict=True):
            if kind == "weight" or vision.normalization == "LayerNorm":
                yield rename(f"{mcore}{one}.layer_norm_{kind}", f"{hf}{norm}.{kind}", (width,))
