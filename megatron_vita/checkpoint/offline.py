"""Checkpoints in one process, without a process group: what conversion, chat and inspection read and write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.boxes import whole
from megatron_vita.checkpoint.integrity import PieceDigests
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.planner import Planner
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.streams import byte_bar, default_workers
from megatron_vita.checkpoint.tensors import LazyTensors, as_lazy, bytes_of
from megatron_vita.checkpoint.writer import Writer, write
from megatron_vita.errors import ConfigError
from megatron_vita.files import lock_file

_OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
_FILE_BYTES = 1 << 30
"""Several files, so that threads write side by side."""


def read_tensors(path: str | Path) -> CheckpointTensors:
    """The model's tensors (and the optimizer's, if saved) of a checkpoint, lazily, by checkpoint key."""
    return CheckpointTensors(folders.resolve(path), check=False)  # `resolve` has looked at the other files


def model_keys(tensors: LazyTensors) -> list[str]:
    """The keys that belong to the model rather than to the optimizer."""
    return [key for key in tensors if not key.startswith(_OPTIMIZER_PREFIXES)]


def tensor_digests(path: str | Path) -> dict[str, str]:
    """SHA-256 of each model tensor's values, whatever layout wrote them: which tensors a stage changed."""
    tensors = read_tensors(path)
    return {key: tensor_sha256(tensors[key]) for key in sorted(model_keys(tensors))}


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements in row-major order."""
    return hashlib.sha256(bytes_of(tensor.detach().cpu().contiguous()).numpy().data).hexdigest()


def write_tensors(
    root: str | Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: RunState,
    tokenizer: str | Path | None = None,
    *,
    notes: Mapping[str, str] | None = None,
    replace: bool = True,
    workers: int | None = None,
    durable: bool = True,
    progress: bool = False,
) -> Path:
    """Write a weights-only checkpoint that any layout can load. The bytes do not depend on the number of workers.

    Args:
        root: folder of checkpoints; the new one is root/iter_<iteration>.
        tensors: full tensors by checkpoint key; lazy ones are read one piece at a time.
        tokenizer: folder or file to copy along.
        notes: further text files, by name.
        replace: take the place of a checkpoint of the same iteration.
        workers: threads, by default one more than there are cores (streams.default_workers).
        durable: wait until the disk has the tensors, so that a power cut cannot leave a name without its content.
        progress: show a bar on standard error.

    Returns:
        The published folder. If writing fails, nothing of it is left.

    Raises:
        CheckpointError: no space, or the tensors cannot be read.
        ConfigError: nothing can be written there, another process is just doing so, or something is there and not to be
            replaced.
    """
    root, lazy = Path(root), as_lazy(tensors)
    staging, final = folders.staging_folder(root, iteration), folders.step_folder(root, iteration)
    lock = root / f".lock-{final.name}"
    total = sum(map(lazy.nbytes, lazy))
    parts = [Part(key, lazy.shape(key), whole(lazy.shape(key)), _placeholder(lazy, key)) for key in lazy]
    folders.check_room(root, total)

    def publish(pieces: PieceDigests) -> None:
        for name, text in (notes or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        folders.write_files(staging, state, Path(tokenizer) if tokenizer else None, pieces)
        folders.publish(root, iteration)

    with folders.made(root), byte_bar(total, show=progress) as bar, lock_file(lock) as alone:
        if not alone:
            raise ConfigError(f"{final}: another process is writing it. Wait for it, or choose another.")
        folders.restore(final)
        if final.exists() and not replace:
            raise ConfigError(f"{final}: exists, and is not to be replaced. Choose another folder.")
        writer = Writer(
            staging,
            start=partial(folders.start_staging, root, iteration),
            publish=publish,
            workers=workers or default_workers(),
            file_bytes=_FILE_BYTES,
            durable=durable,
            finite=False,
            advance=bar.update,
        )
        try:
            write(Planner(parts, source=lazy.read), writer, {}, alone=True)
        except BaseException:
            folders.discard_staging(root, iteration)
            raise
        finally:
            lock.unlink(missing_ok=True)
    return final


def _placeholder(tensors: LazyTensors, key: str) -> Tensor:
    """Shape and type without elements: those are read when their turn comes."""
    return torch.empty(tensors.shape(key), dtype=tensors.dtype(key), device="meta")
