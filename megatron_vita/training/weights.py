"""Initial weights of a run: from a checkpoint, or from a Hugging Face folder through convert/'s rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from megatron_vita import checkpoint
from megatron_vita.checkpoint.history import StageRecord
from megatron_vita.checkpoint.integrity import Integrity, is_checkpoint
from megatron_vita.convert.card import public_name
from megatron_vita.convert.identity import fingerprint
from megatron_vita.convert.opening import open_model


def find(path: str | Path) -> Path:
    """Resolve `checkpoint.pretrained_checkpoint` to a folder that holds a model. On rank 0.

    Returns:
        `path` itself, or the newest checkpoint in it.

    Raises:
        CheckpointError: no model, or a damaged one.
        ConfigError: an unsupported model.
    """
    return open_model(path).path


def load(folder: Path, models: Sequence[nn.Module]) -> None:
    """Load weights into this rank's model chunks, in any parallel layout. All ranks call it.

    Raises:
        CheckpointError: the folder does not fit the model; on every rank.
    """
    if is_checkpoint(folder):
        checkpoint.load_weights(folder, models)
    else:
        opened = open_model(folder)
        checkpoint.load_tensors(opened.tensors, models, str(folder), saved=opened.model)


def decoder_family(folder: Path) -> str | None:
    """model_type of the family that a folder's decoder came from, if it is known: an export names it so again."""
    return open_model(folder).decoder


def identity(folder: Path) -> str:
    """A digest of a folder's weights, wherever it lies. A checkpoint's is over its tensors alone, so that a stage whose
    last steps were done again, bit for bit and in the same layout, is the same start for the next one."""
    if not is_checkpoint(folder):
        return fingerprint(folder)
    files = Integrity.read(folder).files
    pieces = {name: entry["pieces"] for name, entry in files.items() if "pieces" in entry}
    return hashlib.sha256(json.dumps(pieces, sort_keys=True).encode()).hexdigest()


def is_same(folder: Path, digest: str) -> bool:
    """Whether a folder's weights are those with this `identity`. Earlier releases held convert's fingerprint."""
    return digest in (identity(folder), fingerprint(folder))


def origin(folder: Path) -> tuple[Mapping[str, str], tuple[StageRecord, ...]]:
    """Provenance of a folder's weights: ({part of the model: name of its base model}, records of earlier stages)."""
    if not is_checkpoint(folder):
        return {"model": public_name(folder)}, ()
    state = checkpoint.read_state(folder)
    return state.base_models, state.history
