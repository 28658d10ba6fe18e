"""The weights that a run starts from: a checkpoint, or a Hugging Face folder read by conversion's own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from megatron_vita import checkpoint
from megatron_vita.checkpoint.history import StageRecord
from megatron_vita.checkpoint.integrity import is_checkpoint
from megatron_vita.convert.card import public_name
from megatron_vita.convert.opening import open_model


def find(path: str | Path) -> Path:
    """The folder that `checkpoint.pretrained_checkpoint` means, opened once to see that it holds a model.

    Returns:
        The folder itself, or the newest checkpoint below it.

    Raises:
        CheckpointError, ConfigError: no model, or a damaged or unsupported one.
    """
    return open_model(path).path


def load(folder: Path, models: Sequence[nn.Module]) -> None:
    """Fill models laid out in any way, each rank with its part; called by every rank.

    Raises:
        CheckpointError: on every rank, if the folder does not fit the models.
    """
    if is_checkpoint(folder):
        checkpoint.load_weights(folder, models)
    else:
        opened = open_model(folder)
        checkpoint.load_tensors(opened.tensors, models, str(folder), saved=opened.model)


def origin(folder: Path) -> tuple[Mapping[str, str], tuple[StageRecord, ...]]:
    """(base models by part, stages) that led to the weights of a folder, as far as it remembers."""
    if not is_checkpoint(folder):
        return {"model": public_name(folder)}, ()
    state = checkpoint.read_state(folder)
    return state.base_models, state.history
