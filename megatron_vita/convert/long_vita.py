"""Long-VITA's published Hugging Face format: a Qwen2 config with a `visual` object, InternViT in OpenGVLab's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert import decoders, intern_vit
from megatron_vita.convert.processor_files import read_side_file, with_norm
from megatron_vita.convert.rules import Rule, rename
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError

MODEL_TYPE = "long_vita"
ARCHITECTURE = "LongVITAForCausalLM"


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A published config.json as ours. Raises CheckpointError for what is missing or not supported."""
    visual = config.get("visual")
    if not isinstance(visual, Mapping):
        raise CheckpointError(f"{where}: has no `visual` object. Is it a Long-VITA model?")
    model = decoders.read_config(config, where)
    tower, _ = intern_vit.read_config({"model_type": "intern_vit_6b", **visual}, f"{where}: visual")
    return replace(model, vision=tower, projector=ProjectorConfig(ffn_hidden_size=tower.hidden_size, bias=False))


def read_spec(folder: Path, vision: VisionConfig) -> PreprocessSpec:
    """How a published model wants its pictures: in Long-VITA's own token layout, normalised as its settings say."""
    own = PreprocessSpec.for_tower(with_norm(folder, vision))
    return read_side_file(folder, vision) or replace(own, layout="long_vita")


def write_config(model: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Our model as their config.json.

    Raises:
        CheckpointError: their projector cannot represent ours; says why.
    """
    check_exportable(model)
    assert model.vision is not None
    return {
        **decoders.write_config(model, dtype, token_ids),
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "visual": intern_vit.write_config(model.vision, intern_vit.REMOTE, dtype),
    }


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that is not a Qwen2 with their projector: no biases, as wide as the tower.

    Raises:
        CheckpointError: saying what differs.
    """
    if model.vision is None:
        raise CheckpointError("the checkpoint has no vision tower. Export it with --format llm.")
    if decoders.kind_of(model) != "qwen2" or model.rope_scaling_factor is not None:
        raise CheckpointError(
            f"Long-VITA's decoder is a Qwen2 without rotary scaling, this one is a {decoders.kind_of(model)}"
            f"{'' if model.rope_scaling_factor is None else ' with it'}. Export with --format internvl."
        )
    intern_vit.check_exportable(model.vision, intern_vit.REMOTE)
    if model.projector.bias or model.projector_width != model.vision.hidden_size:
        raise CheckpointError(
            f"Long-VITA's projector has no biases and the tower's width {model.vision.hidden_size}; this one has "
            f"{'biases' if model.projector.bias else 'no biases'} and width {model.projector_width}. Export with "
            "--format internvl."
        )


def rules(model: ModelConfig) -> list[Rule]:
    """Every tensor of the model in the published names."""
    assert model.vision is not None
    shuffled, inner = 4 * model.vision.hidden_size, model.projector_width
    their, our = "model.vision_projection.", "vision_projection."
    return [
        *decoders.rules(model),
        *intern_vit.rules(model.vision, intern_vit.REMOTE, "model.vision_model."),
        rename(our + "pre_proj_layernorm.weight", their + "pre_proj_layernorm.weight", (shuffled,)),
        rename(our + "pre_proj_layernorm.bias", their + "pre_proj_layernorm.bias", (shuffled,)),
        rename(our + "encoder.linear_fc1.weight", their + "mlp.0.weight", (inner, shuffled)),
        rename(our + "encoder.linear_fc2.weight", their + "mlp.2.weight", (model.hidden_size, inner)),
    ]
