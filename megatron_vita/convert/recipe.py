"""Compare a recipe's model section with the tower and decoder that are joined into that model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.config import ModelConfig, load_model, to_dict
from megatron_vita.errors import ConfigError

_OWN = {
    "max_position_embeddings",
    "init_method_std",
    "embedding_init_method_std",
    "transformer_impl",
    "make_vocab_size_divisible_by",
    "vision.init_method_std",
    "vision.layer_scale_init",
    "vision.tensor_parallel",
    "vision.tiles_per_batch",
}
"""Settings that do not change what given weights compute; only the recipe has them."""


@dataclass(frozen=True)
class Recipe:
    """The model that a training recipe wants."""

    model: ModelConfig
    where: str
    """Names the recipe in errors."""

    @classmethod
    def read(cls, path: str | Path, flags: Sequence[str] = ()) -> Recipe:
        """The model section of a recipe, with flags laid over it as in training. Raises ConfigError as load_model."""
        return cls(load_model(path, flags), str(path))

    def fit(self, parts: ModelConfig) -> ModelConfig:
        """The recipe's model, once it is the one that the folders of the parts hold. Raises ConfigError: naming every
        setting that differs."""
        if (self.model.vision is None) != (parts.vision is None):
            names = ("recipe", "folders")
            has, lacks = names if self.model.vision is not None else names[::-1]
            raise ConfigError(
                f"{self.where}: a vision tower stands in the {has}, none in the {lacks}. Give both one, or neither."
            )
        wanted, given = _resolved(self.model), _resolved(parts)
        differing = [
            f"model.{name} is {value!r}, in the folders {given[name]!r}"
            for name, value in wanted.items()
            if value != given[name] and name not in _OWN
        ]
        if differing:
            raise ConfigError(
                f"{self.where}: {'; '.join(differing)}. Correct the recipe, or give the folders it was written for."
            )
        return self.model


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """Settings by name, where several ways of saying one thing are made one."""
    vision = model.vision and dataclasses.replace(model.vision, select_layer=model.vision.selected_layer)
    projector = dataclasses.replace(model.projector, ffn_hidden_size=model.projector_width)
    sections = to_dict(dataclasses.replace(model, kv_channels=model.head_dim, vision=vision, projector=projector))
    if vision is None:  # and so nothing that a projector would join
        sections["projector"] = None
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
