"""transformers' native InternVL: what stock code loads and serves, without remote code.

Its class builds the decoder by its own model_type, but every tower as an InternViT: a config.json
that says otherwise is read as one all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig, ProjectorConfig
from megatron_vita.convert.families import decoder as decoders
from megatron_vita.convert.families import intern_vit, internvl_processor
from megatron_vita.convert.families.decoder_table import DECODERS
from megatron_vita.convert.hf_config import check_not_quantised, choice, flag, integer, require, section
from megatron_vita.convert.processor_files import with_own_projector
from megatron_vita.convert.rules import Rule, all_zero, rename, zero_padded
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError

MODEL_TYPE = "internvl"
ARCHITECTURE = "InternVLForConditionalGeneration"
_PROJECTOR_EPSILON = 1e-5
"""torch's default, which the LayerNorm of InternVL's projector always has."""


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A config.json of model_type internvl as a ModelConfig. Raises CheckpointError: a part is of an unknown kind, or
    asks for what is not supported."""
    text, vision = section(config, "text_config", where), section(config, "vision_config", where)
    if text is None or vision is None:
        raise CheckpointError(f"{where}: has no text_config or no vision_config. Is it an InternVL of transformers?")
    choice(text, "model_type", DECODERS, "qwen2", f"{where}: text_config")
    check_not_quantised(config, where)
    require(config, "downsample_ratio", 0.5, 0.5, where)
    require(config, "projector_hidden_act", "gelu", "gelu", where)
    require(config, "vision_feature_layer", -1, -1, where)
    require(config, "vision_feature_select_strategy", "default", "default", where)
    tied = flag(config, "tie_word_embeddings", True, where)
    model = decoders.read_config({**text, "tie_word_embeddings": tied}, f"{where}: text_config")
    tower, _ = intern_vit.read_config({"model_type": "internvl_vision", **vision}, f"{where}: vision_config")
    wanted = integer({"image_seq_length": 256, **config}, "image_seq_length", where)
    if wanted != tower.tokens_per_tile:
        raise CheckpointError(f"{where}: image_seq_length={wanted}, the tower gives {tower.tokens_per_tile} a tile.")
    return replace(model, vision=tower, projector=ProjectorConfig())


def image_token_id(config: Mapping[str, Any], where: str) -> int:
    """Id of the token that stands for a picture; transformers' default where the config does not say it. Raises
    CheckpointError: it is no id."""
    value = config.get("image_token_id", 151667)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: image_token_id={value!r} is no id of a token. Download it again.")
    return value


def processor(folder: Path, model: ModelConfig) -> PreprocessSpec:
    """How stock code prepares the model's pictures."""
    assert model.vision is not None
    return internvl_processor.read_spec(folder, model.vision)


def completed(model: ModelConfig, config: Mapping[str, Any], folder: Path, names: Collection[str]) -> ModelConfig:
    """The model with a tied head or not, as its tensors say, and the projector's width before an export padded it."""
    return with_own_projector(folder, with_head_of(model, config, names))


def with_head_of(model: ModelConfig, config: Mapping[str, Any], names: Collection[str]) -> ModelConfig:
    """A model that its config.json ties, with the head that its folder has nevertheless.

    Stock code ties by the outer tie_word_embeddings, whose default is true, unless it finds a head of other values.
    InternVL3's folders count on that: they hold a head, and say nothing. Where text_config says true, the head is taken
    for a copy of the embedding, and must be one.

    Args:
        model: what read_config made of the config.json.
        config: the config.json.
        names: tensor names of the folder.
    """
    text = config.get("text_config") or {}
    if text.get("tie_word_embeddings") or not any(name.endswith(decoders.HEAD) for name in names):
        return model
    return replace(model, untie_embeddings_and_output_weights=True)


def write_config(
    model: ModelConfig, dtype: str, token_ids: Mapping[str, Any], decoder: str | None = None
) -> dict[str, Any]:
    """The model as a config.json of model_type internvl. Raises CheckpointError: transformers' classes cannot represent
    the model; says why."""
    check_exportable(model)
    assert model.vision is not None
    tied = not model.untie_embeddings_and_output_weights
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "text_config": decoders.write_config(model, dtype, token_ids, decoder),
        "vision_config": intern_vit.write_config(model.vision, intern_vit.NATIVE, dtype),
        "image_token_id": token_ids["image_token_id"],
        "image_seq_length": model.vision.tokens_per_tile,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "bos_token_id": token_ids.get("bos_token_id"),
        "eos_token_id": token_ids.get("eos_token_id"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_exportable(model: ModelConfig) -> None:
    """Reject a model that transformers' InternVL cannot hold. Raises CheckpointError: no tower, a decoder or tower that
    no class holds, or a projector wider than the decoder or with another epsilon in its LayerNorm."""
    if model.vision is None:
        raise CheckpointError("the checkpoint has no vision tower. Export it with --format llm.")
    decoders.check_exportable(model)
    intern_vit.check_exportable(model.vision, intern_vit.NATIVE)
    if model.projector_width > model.hidden_size:
        raise CheckpointError(
            f"the projector's inner width {model.projector_width} exceeds the decoder's {model.hidden_size}, and that "
            "is what InternVL's projector has: no room for it. Export with --format long_vita, or train "
            f"with model.projector.ffn_hidden_size of at most {model.hidden_size}."
        )
    if model.projector.norm_epsilon != _PROJECTOR_EPSILON:
        raise CheckpointError(
            f"model.projector.norm_epsilon={model.projector.norm_epsilon}, but InternVL's projector always has "
            f"{_PROJECTOR_EPSILON}. Such a model cannot be exported in this format."
        )


def rules(model: ModelConfig, names: Collection[str] = (), decoder: str | None = None) -> list[Rule]:
    """Every tensor of the model; a projector narrower than the decoder is padded with zeros, which changes nothing.

    Args:
        model: the whole model.
        names: tensor names of a folder that is being read: transformers has two spellings, on disk and in memory.
        decoder: model_type of the decoder's family, where several hold it.
    """
    assert model.vision is not None
    if any(name.startswith("model.language_model.") for name in names):
        tower, projector = "model.vision_tower.", "model.multi_modal_projector."
        table = decoders.rules(model, names, decoder, body="model.language_model.", head=decoders.HEAD)
    else:
        tower, projector = "vision_tower.", "multi_modal_projector."
        body, head = "language_model.model.", "language_model." + decoders.HEAD
        table = decoders.rules(model, names, decoder, body=body, head=head)
    table += intern_vit.rules(model.vision, intern_vit.NATIVE, tower)
    shuffled, inner, width = 4 * model.vision.hidden_size, model.projector_width, model.hidden_size
    top = "vision_projection."
    for kind in ("weight", "bias"):
        table.append(rename(f"{top}pre_proj_layernorm.{kind}", f"{projector}layer_norm.{kind}", (shuffled,)))
    for number, rows, columns, hf_rows, hf_columns in (
        (1, inner, shuffled, width, shuffled),
        (2, width, inner, width, width),
    ):
        mcore, hf = f"{top}encoder.linear_fc{number}", f"{projector}linear_{number}"
        table.append(zero_padded(mcore + ".weight", hf + ".weight", (rows, columns), (hf_rows, hf_columns)))
        if model.projector.bias:
            table.append(zero_padded(mcore + ".bias", hf + ".bias", (rows,), (hf_rows,)))
        else:
            table.append(all_zero(hf + ".bias", (hf_rows,)))
    return table
