"""Checkpoints in one process, without a process group: what conversion, chat and inspection read and write."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.archive import empty_dict
from megatron_vita.checkpoint.dtypes import bits_of
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, write_integrity
from megatron_vita.checkpoint.journal import Entry, Journal, check_room, is_sealed
from megatron_vita.checkpoint.lazy import LazyTensors, as_lazy
from megatron_vita.checkpoint.state import RUN_FILE, RunState
from megatron_vita.checkpoint.storage import WrittenPiece, write_metadata
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.streaming import PlannedPiece, plan_files, stream_files
from megatron_vita.checkpoint.streams import Workers, byte_bar, default_workers, digest_of, raw
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import XXH3, sync

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

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
    return hashlib.sha256(raw(bits_of(tensor.detach().cpu().contiguous()))).hexdigest()


def write_tensors(
    root: str | Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: RunState,
    tokenizer_dir: str | Path | None = None,
    *,
    notes: Mapping[str, str] | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = True,
    workers: int | None = None,
    durable: bool = True,
    progress: bool = False,
) -> Path:
    """Write a weights-only checkpoint that any layout can load. The bytes do not depend on the number of workers.

    Args:
        root: folder of checkpoints; the new one is root/iter_<iteration>.
        tensors: full tensors by checkpoint key; lazy ones are read one block at a time.
        tokenizer_dir: Hugging Face tokenizer folder to copy along.
        notes: further text files, by name.
        source: JSON values that change whenever a value of the tensors may. With it, what a killed process has written
            is kept and the rest is added; without it, everything is written anew.
        replace: take the place of a checkpoint of the same iteration.
        workers: threads, by default one more than there are cores (streams.default_workers).
        durable: wait until the disk has everything, so that a power cut cannot leave a name without its content.
        progress: show a bar on standard error.

    Returns:
        The published folder. If writing fails, nothing of it is left.

    Raises:
        CheckpointError: no space, or the tensors cannot be read.
        ConfigError: nothing can be written there, another process is just doing so, or something is there and not to be
            replaced.
    """
    root, lazy = Path(root), as_lazy(tensors)
    files = plan_files(lazy)
    staging, final = folders.staging_folder(root, iteration), folders.step_folder(root, iteration)
    total = sum(map(_size, files.values()))
    if not is_sealed(staging, final):
        check_room(root, total, staging)
    plan = [[one.key, list(one.global_shape), str(one.dtype), one.position] for two in files.values() for one in two]
    identity = {
        "source": os.urandom(16).hex() if source is None else source,
        "plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
    }
    try:
        with (
            Journal(staging, identity, final) as journal,
            Workers(workers or default_workers()) as pool,
            byte_bar(total, show=progress) as bar,
        ):
            if journal.published:
                return folders.finish_publishing(root, iteration)
            folders.restore(final)
            if final.exists() and not replace:
                folders.finish_publishing(root, iteration)  # in the place of whoever wrote it, and was killed then
                raise ConfigError(f"{final}: exists, and is not to be replaced. Choose another folder.")
            written = _write_files(journal, lazy, files, pool, bar.update, durable=durable)
            write_metadata(staging, written)
            (staging / COMMON_FILE).write_bytes(empty_dict())
            (staging / RUN_FILE).write_text(state.to_json(), encoding="utf-8")
            for name, text in (notes or {}).items():
                (staging / name).write_text(text, encoding="utf-8")
            folders.copy_tokenizer(Path(tokenizer_dir) if tokenizer_dir else None, staging)
            digests: dict[str, list[tuple[int, str]]] = {name: [] for name in files}
            for one in written:
                digests[one.file].append((one.length, one.digest))
            write_integrity(staging, digests)
            journal.seal(INTEGRITY_FILE)
            return folders.publish(root, iteration)
    except OSError as error:
        raise CheckpointError(
            f"{final}: could not be written ({error}). Nothing was published. Make room, or choose another folder."
        ) from None


def _write_files(
    journal: Journal,
    tensors: LazyTensors,
    files: Mapping[str, Sequence[PlannedPiece]],
    pool: Workers,
    advance: Callable[[int], object],
    *,
    durable: bool,
) -> list[WrittenPiece]:
    """The tensor files, save those that a killed process has finished."""
    digests: dict[str, list[str]] = {}

    def intact(path: Path, entry: Entry) -> bool:
        pieces, found = files[path.name], entry.get(XXH3)
        if not isinstance(found, list) or len(found) != len(pieces):
            return False
        return path.stat().st_size == _size(pieces) and found == list(
            pool.map(lambda piece: digest_of(path, piece.position, piece.length), pieces)
        )

    def finished(name: str, found: list[str]) -> None:
        digests[name] = found
        if durable:
            sync(journal.staging / name)
        journal.add(name, {XXH3: found})

    for name, pieces in files.items():
        kept = journal.kept(name, intact)
        if kept is not None:
            log.info("%s was finished by an earlier run and is kept", name)
            digests[name] = list(kept[XXH3])
            advance(_size(pieces))
    left = {name: pieces for name, pieces in files.items() if name not in digests}
    stream_files(journal.staging, left, tensors, pool, advance, finished)
    return [
        piece.written(name, digest)
        for name, pieces in files.items()
        for piece, digest in zip(pieces, digests[name], strict=True)
    ]


def _size(pieces: Sequence[PlannedPiece]) -> int:
    """Bytes of a file."""
    return pieces[-1].position + pieces[-1].length
