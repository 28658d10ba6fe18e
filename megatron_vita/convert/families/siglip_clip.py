"""SigLIP and CLIP towers as transformers writes them: alone, or inside a model of pictures and texts.

Both have the same tensor names. Keys that the projector never uses are excluded by name: the text half, the pooling
head, the norm of the pooled state, and the blocks after the selected one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import VisionConfig
from megatron_vita.convert.combined import Subset
from megatron_vita.convert.families.intern_vit import Names, layer_rules
from megatron_vita.convert.hf_config import check_not_quantised, choice, require, section, tower_sizes
from megatron_vita.convert.rules import Rule, rename
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_COMMON = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": {**_COMMON, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip": {**_COMMON, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
"""transformers' own defaults: published files omit settings that equal them."""
MODEL_TYPES = {"siglip": "siglip", "siglip_vision_model": "siglip", "clip": "clip", "clip_vision_model": "clip"}
"""model_type of a whole model or of its tower -> model.vision.model_type."""
_NAMES = Names(
    class_token="embeddings.class_embedding",
    position="embeddings.position_embedding.weight",
    patch="embeddings.patch_embedding",
    layer="encoder.layers.{n}.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norms=("layer_norm1", "layer_norm2"),
)
_NESTED = "vision_model."
"""Prefix of the tower's tensors inside a model of pictures and texts, and in towers that older releases saved."""
_OTHER_HALF = re.compile(
    r"(text_model\.|head\.|visual_projection\.|text_projection\.|logit_scale$|logit_bias$|"
    r"embeddings\.position_ids$|vision_model\.(head\.|embeddings\.position_ids$))"
)


def read_config(config: Mapping[str, Any], where: str) -> VisionConfig:
    """A tower's config.json, or that of a model of pictures and texts, as a VisionConfig. Raises CheckpointError: an
    unknown kind, or an unsupported feature."""
    family = MODEL_TYPES[choice(config, "model_type", MODEL_TYPES, None, where)]
    # CLIP's oldest files say it twice; transformers believes the second and fills it up with its own defaults.
    inner = section(config, "vision_config_dict", where) if family == "clip" else None
    inner = section({"vision_config": config, **config}, "vision_config", where) if inner is None else inner
    inner = {} if inner is None else inner  # null, as stock code has it, is all defaults
    for part in (config, inner):
        check_not_quantised(part, where)
    full = {**DEFAULTS[family], **inner}
    require(full, "hidden_act", DEFAULTS[family]["hidden_act"], None, where)
    require(full, "num_channels", 3, None, where)
    try:
        return VisionConfig(model_type=family, **tower_sizes(full, where), image_norm=family)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def kind_of(config: Mapping[str, Any]) -> str | None:
    """model_type of such a tower, or of a model of pictures and texts that has one; else none."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and kind in MODEL_TYPES else None


def read_tower(
    config: Mapping[str, Any], where: str
) -> tuple[VisionConfig, Callable[[LazyTensors], tuple[LazyTensors, list[Rule]]]]:
    """A tower alone, or in a model of pictures and texts: its settings; its tensors and the rules for them."""
    vision = read_config(config, where)

    def used(source: LazyTensors) -> tuple[LazyTensors, list[Rule]]:
        source = without_unused(vision, source)
        return source, rules(vision, prefix_of(list(source)))

    return vision, used


def prefix_of(names: Collection[str]) -> str:
    """Prefix of the tower's tensors in a Hugging Face folder."""
    return _NESTED if any(name.startswith(_NESTED) for name in names) else ""


def without_unused(vision: VisionConfig, source: LazyTensors) -> LazyTensors:
    """The tensors of a folder without the keys that the projector never uses; their number is logged."""
    start = prefix_of(list(source))

    def unused(name: str) -> bool:
        if _OTHER_HALF.match(name):
            return True
        inner = name.removeprefix(start) if name.startswith(start) else ""
        block = re.match(r"encoder\.layers\.(\d{1,6})\.", inner)
        if block:
            return vision.built_layers <= int(block[1]) < vision.num_layers
        return inner.startswith("post_layernorm.") and not vision.post_norm

    dropped = {name for name in source if unused(name)}
    if dropped:
        log.info("%d unused tensors, which the projector never sees, e.g. %s", len(dropped), min(dropped))
    return Subset(source, [name for name in source if name not in dropped])


def rules(vision: VisionConfig, prefix: str = "") -> list[Rule]:
    """Every tensor of the tower that runs; `prefix` begins its Hugging Face names."""
    width, side, family = vision.hidden_size, vision.patch_size, vision.family
    top, patch = "vision_model.", prefix + _NAMES.patch
    table = [
        rename(top + "position_embeddings.weight", prefix + _NAMES.position, (vision.num_positions, width)),
        rename(top + "conv1.weight", patch + ".weight", (width, 3, side, side)),
    ]
    if family.patch_bias:
        table.append(rename(top + "conv1.bias", patch + ".bias", (width,)))
    if family.class_token:
        table.append(rename(top + "class_token", prefix + _NAMES.class_token, (1, 1, width), hf_shape=(width,)))
    outer = [("ln_pre", "pre_layrnorm")] * family.pre_norm + [("ln_post", "post_layernorm")] * vision.post_norm
    for kind in ("weight", "bias"):
        table += [rename(f"{top}{one}.{kind}", f"{prefix}{two}.{kind}", (width,)) for one, two in outer]
    for layer in range(vision.built_layers):
        table += layer_rules(vision, _NAMES, f"{top}decoder.layers.{layer}.", prefix + _NAMES.layer.format(n=layer))
    return table
