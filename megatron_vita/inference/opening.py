"""A model on disk with the overrides of the engine's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_vita.config import with_rope_scaling
from megatron_vita.convert import OpenModel, open_model
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError
from megatron_vita.inference.settings import EngineSettings


def open_for_inference(path: str | Path, settings: EngineSettings) -> OpenModel:
    """Open a checkpoint or a Hugging Face folder; its rotary embedding, longest sequence and most frames are those that
    `settings` ask for. No tensor is read yet.

    Args:
        path: see `open_model`.
        settings: `rope_scaling`, `rotary_base`, `max_position_embeddings`, `max_frames`; the rest is not looked at.

    Raises:
        ConfigError: nothing that can be opened, a scaling that the model does not allow, or frames for a model without
            a vision tower.
    """
    opened = open_model(path)
    model = with_rope_scaling(
        opened.model,
        settings.rope_scaling,
        rotary_base=settings.rotary_base,
        max_position_embeddings=settings.max_position_embeddings,
    )
    preprocess = opened.preprocess
    if settings.max_frames is not None:
        if model.vision is None:
            raise ConfigError(f"max_frames={settings.max_frames}: {path} is a text-only model. Leave it out.")
        preprocess = replace(preprocess or PreprocessSpec.for_tower(model.vision), max_frames=settings.max_frames)
    return replace(opened, model=model, preprocess=preprocess)


def model_name(path: str | Path) -> str:
    """Name of a model in tables: the stage that trained it, or the name of its folder.

    Raises:
        ConfigError: no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder. Give a checkpoint or a Hugging Face folder.")
    opened = open_model(path)
    return opened.state.stage.name if opened.state else opened.path.resolve().name
