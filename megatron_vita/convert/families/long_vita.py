"""Long-VITA's published Hugging Face format: a Qwen2 config with a `visual` object, InternViT in OpenGVLab's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig, ProjectorConfig
from megatron_vita.convert.families import decoder as decoders
from megatron_vita.convert.families import intern_vit
from megatron_vita.convert.families.decoder_table import family_of
from megatron_vita.convert.processor_files import read_side_file, with_norm
from megatron_vita.convert.rules import Rule, rename
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError

MODEL_TYPE = "long_vita"
ARCHITECTURE = "LongVITAForCausalLM"
_DECODER = "qwen2"


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A published config.json as a ModelConfig. Raises CheckpointError for what is missing or not supported."""
    visual = config.get("visual")
    if not isinstance(visual, Mapping):
        raise CheckpointError(f"{where}: has no `visual` object. Is it a Long-VITA model?")
    model = decoders.read_config({**config, "model_type": _DECODER}, where)
    tower, _ = intern_vit.read_config({"model_type": "intern_vit_6b", **visual}, f"{where}: visual")
    return replace(model, vision=tower, projector=ProjectorConfig(ffn_hidden_size=tower.hidden_size, bias=False))


def processor(folder: Path, model: ModelConfig) -> PreprocessSpec:
    """Preprocessing of a published model: Long-VITA's token layout, pixels normalised as its settings say."""
    assert model.vision is not None
    own = PreprocessSpec.for_tower(with_norm(folder, model.vision))
    return read_side_file(folder, model.vision) or replace(own, layout="long_vita")


def completed(model: ModelConfig, config: Mapping[str, Any], folder: Path, names: Collection[str]) -> ModelConfig:
    """The model unchanged: config.json is complete."""
    return model


def image_token_id(config: Mapping[str, Any], where: str) -> int | None:
    """None: no published config.json names the image token."""
    return None


def write_config(
    model: ModelConfig, dtype: str, token_ids: Mapping[str, Any], decoder: str | None = None
) -> dict[str, Any]:
    """The model as a config.json of Long-VITA. Raises CheckpointError: Long-VITA's classes cannot represent the model;
    says why."""
    check_exportable(model)
    assert model.vision is not None
    return {
        **decoders.write_config(model, dtype, token_ids, _DECODER),
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "visual": intern_vit.write_config(model.vision, intern_vit.REMOTE, dtype),
    }


def check_exportable(model: ModelConfig) -> None:
    """Reject a model that is not a Qwen2 with Long-VITA's projector: no biases, as wide as the tower. Raises
    CheckpointError: saying what differs."""
    if model.vision is None:
        raise CheckpointError("the checkpoint has no vision tower. Export it with --format llm.")
    kind = family_of(model, _DECODER).model_type
    if kind != _DECODER:
        raise CheckpointError(f"Long-VITA's decoder is a Qwen2, this one is a {kind}. Export with --format internvl.")
    intern_vit.check_exportable(model.vision, intern_vit.REMOTE)
    if model.projector.bias or model.projector_width != model.vision.hidden_size:
        raise CheckpointError(
            f"Long-VITA's projector has no biases and the tower's width {model.vision.hidden_size}; this one has "
            f"{'biases' if model.projector.bias else 'no biases'} and width {model.projector_width}. Export with "
            "--format internvl."
        )


def rules(model: ModelConfig, names: Collection[str] = (), decoder: str | None = None) -> list[Rule]:
    """Every tensor of the model in the published names."""
    assert model.vision is not None
    shuffled, inner = 4 * model.vision.hidden_size, model.projector_width
    hf, mcore = "model.vision_projection.", "vision_projection."
    return [
        *decoders.rules(model, names, _DECODER),
        *intern_vit.rules(model.vision, intern_vit.REMOTE, "model.vision_model."),
        rename(mcore + "pre_proj_layernorm.weight", hf + "pre_proj_layernorm.weight", (shuffled,)),
        rename(mcore + "pre_proj_layernorm.bias", hf + "pre_proj_layernorm.bias", (shuffled,)),
        rename(mcore + "encoder.linear_fc1.weight", hf + "mlp.0.weight", (inner, shuffled)),
        rename(mcore + "encoder.linear_fc2.weight", hf + "mlp.2.weight", (model.hidden_size, inner)),
    ]
