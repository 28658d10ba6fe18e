"""The registry of model and tower families, and the interface of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.config import ModelConfig, VisionConfig
from megatron_vita.convert.families import decoder, intern_vit, internvl, long_vita, siglip_clip
from megatron_vita.convert.families.decoder_table import DECODERS
from megatron_vita.convert.rules import Rule
from megatron_vita.data.spec import PreprocessSpec


class WholeModel(Protocol):
    """A format of whole models; a module each."""

    def read_config(self, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Model settings of a config.json. Raises CheckpointError, naming what is missing or not supported."""

    def processor(self, folder: Path, model: ModelConfig) -> PreprocessSpec | None:
        """Preprocessing of the pictures; none for a decoder alone."""

    def completed(
        self, model: ModelConfig, config: Mapping[str, Any], folder: Path, names: Collection[str]
    ) -> ModelConfig:
        """The model completed from the other files of its folder and from the names of its tensors."""

    def image_token_id(self, config: Mapping[str, Any], where: str) -> int | None:
        """Id of the image token, if the config names it."""

    def rules(self, model: ModelConfig, names: Collection[str] = (), decoder: str | None = None) -> list[Rule]:
        """Every tensor of the model, by the names in a folder that is read, and by the decoder's model_type."""

    def check_exportable(self, model: ModelConfig) -> None:
        """Raises CheckpointError, saying why the format cannot hold the model."""

    def write_config(
        self, model: ModelConfig, dtype: str, token_ids: Mapping[str, Any], decoder: str | None = None
    ) -> dict[str, Any]:
        """config.json of a model."""


class Tower(Protocol):
    """Vision towers of one kind; a module each."""

    def kind_of(self, config: Mapping[str, Any]) -> str | None:
        """model_type of a config.json that is such a tower, or holds one; else none."""

    def read_tower(
        self, config: Mapping[str, Any], where: str
    ) -> tuple[VisionConfig, Callable[[LazyTensors], tuple[LazyTensors, list[Rule]]]]:
        """The tower's settings; and of a folder's tensors, those that it uses with the rules for them."""


MODELS: dict[str, WholeModel] = {
    internvl.MODEL_TYPE: internvl,
    long_vita.MODEL_TYPE: long_vita,
    **dict.fromkeys(DECODERS, decoder),
}
"""model_type -> format."""
TOWERS: tuple[Tower, ...] = (siglip_clip, intern_vit)
TOWER_TYPES = (*intern_vit.MODEL_TYPES, *siglip_clip.MODEL_TYPES)
EXPORTS: dict[str, WholeModel] = {"internvl": internvl, "long_vita": long_vita, "llm": decoder}
"""`--format` -> format."""
STOCK = (internvl.MODEL_TYPE, *DECODERS)
"""model_types that transformers loads with no code of the publisher's."""
