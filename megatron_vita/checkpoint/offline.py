"""Checkpoints in one process, without a process group: what conversion, chat and inspection read and write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.lazy import LazyTensors, as_lazy
from megatron_vita.checkpoint.state import RUN_FILE, RunState
from megatron_vita.checkpoint.storage import CheckpointTensors, Piece, write_metadata, write_pieces

PIECE_BYTES = 64 << 20
"""Large tensors are written in runs of rows of about this size, so that a reader of a part need not read it all."""
COMMON_FILE = "common.pt"
_OPTIMIZER_PREFIXES = ("optimizer.", "chained_")


def read_tensors(path: str | Path) -> CheckpointTensors:
    """The model's tensors (and the optimizer's, if saved) of a checkpoint, lazily, by checkpoint key."""
    return CheckpointTensors(folders.resolve(path))


def model_keys(tensors: LazyTensors) -> list[str]:
    """The keys that belong to the model rather than to the optimizer."""
    return [key for key in tensors if not key.startswith(_OPTIMIZER_PREFIXES)]


def tensor_digests(path: str | Path) -> dict[str, str]:
    """SHA-256 of each model tensor's values, whatever layout wrote them: which tensors a stage changed."""
    tensors = read_tensors(path)
    return {key: tensor_sha256(tensors[key]) for key in sorted(model_keys(tensors))}


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements in row-major order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def write_tensors(
    root: str | Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: RunState,
    tokenizer_dir: str | Path | None = None,
) -> Path:
    """Write a weights-only checkpoint that any layout can load.

    Args:
        root: folder of checkpoints; the new one is root/iter_<iteration>.
        tensors: full tensors by checkpoint key; lazy ones are read one piece at a time.
        tokenizer_dir: Hugging Face tokenizer folder to copy along.

    Returns:
        The published folder. If writing fails, nothing of it is left.
    """
    root = Path(root)
    staging = folders.start_staging(root, iteration)
    try:
        written = write_pieces(staging, "__0_0.distcp", _row_pieces(as_lazy(tensors)))
        write_metadata(staging, written)
        torch.save({}, staging / COMMON_FILE)
        (staging / RUN_FILE).write_text(state.to_json(), encoding="utf-8")
        folders.copy_tokenizer(Path(tokenizer_dir) if tokenizer_dir else None, staging)
        write_integrity(staging, {"__0_0.distcp": [(one.length, one.sha256) for one in written]})
        return folders.publish(root, iteration)
    except BaseException:
        folders.discard_staging(root, iteration)
        raise


def _row_pieces(tensors: LazyTensors) -> Iterator[Piece]:
    for key in tensors:
        shape = tensors.shape(key)
        if not shape:
            yield Piece(key, shape, (), tensors.read(key))
            continue
        rows = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * tensors.dtype(key).itemsize))
        for start in range(0, max(shape[0], 1), rows):
            region = (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))
            yield Piece(key, shape, (start, *(0 for _ in shape[1:])), tensors.read(key, region))
