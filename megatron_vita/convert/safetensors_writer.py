"""Write folders of safetensors block by block in several threads; the bytes do not depend on their number.

Files are the unit that a killed conversion keeps: each is noted in the journal, with its digest, once it is complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.journal import Entry, Journal
from megatron_vita.checkpoint.lazy import BorrowedView, LazyTensors, Slices, runs, volume, whole
from megatron_vita.checkpoint.streams import BLOCK_BYTES, OutputFile, Workers, digest_of, in_turn, raw
from megatron_vita.convert.safetensors_folder import CODES, INDEX_FILE, SINGLE_FILE
from megatron_vita.errors import CheckpointError
from megatron_vita.files import XXH3, new_digest, sync

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2 * 10**9
"""Files are written, kept after a kill, and loaded side by side: several small ones are better than one large one."""
_RUN_BYTES = 16 << 20
"""Bytes that a thread reads and writes before another hashes them: one shard of a checkpoint, which is read whole."""


@dataclass(frozen=True)
class PlannedFile:
    """One file: its header, and its tensors in order."""

    name: str
    tensors: tuple[str, ...]
    header: bytes
    data_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


def plan_shards(tensors: LazyTensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[PlannedFile]:
    """One file, or as many as it takes for none to hold more tensor data than `max_shard_bytes`, in the tensors' order.
    A tensor that is larger has a file of its own.

    Raises:
        CheckpointError: a tensor has a type that safetensors cannot hold.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = _bytes(tensors, name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return [_plan(SINGLE_FILE, tensors, shards[0])]
    return [
        _plan(f"model-{number:05d}-of-{len(shards):05d}.safetensors", tensors, names)
        for number, names in enumerate(shards, 1)
    ]


def write_safetensors(
    journal: Journal,
    tensors: LazyTensors,
    files: Sequence[PlannedFile],
    workers: Workers,
    advance: Callable[[int], object],
    *,
    durable: bool = False,
) -> dict[str, str]:
    """Write the planned files that are not finished yet into the journal's folder, and their index if they are several.

    Args:
        advance: called with the number of bytes written.

    Returns:
        Digest of each file of weights.

    Raises:
        OSError: no space.
        CheckpointError: the tensors cannot be read.
    """
    digests: dict[str, str] = {}

    def finished(name: str, digest: str) -> None:
        digests[name] = digest
        if durable:
            sync(journal.staging / name)
        journal.add(name, {XXH3: digest})

    for one in files:

        def intact(path: Path, entry: Entry, size: int = one.size) -> bool:
            return path.stat().st_size == size and entry.get(XXH3) == digest_of(path, 0, size)

        kept = journal.kept(one.name, intact)
        if kept is not None:
            log.info("%s was finished by an earlier run and is kept", one.name)
            digests[one.name] = str(kept[XXH3])
            advance(one.data_bytes)
    left = [one for one in files if one.name not in digests]
    _write_files(journal.staging, left, tensors, workers, advance, finished)
    if files[0].name != SINGLE_FILE:
        index = {
            "metadata": {"total_size": sum(one.data_bytes for one in files)},
            "weight_map": {name: one.name for one in files for name in one.tensors},
        }
        (journal.staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


@dataclass(frozen=True)
class _Run:
    """A slice of one tensor and its position in a file."""

    file: str
    name: str
    slices: Slices
    position: int
    last: bool
    """Whether it is the last of its file."""


def _write_files(
    folder: Path,
    files: Sequence[PlannedFile],
    tensors: LazyTensors,
    workers: Workers,
    advance: Callable[[int], object],
    finished: Callable[[str, str], object],
) -> None:
    """Worker threads read and write; this thread hashes what they have written, in the order of each file."""
    outputs: dict[str, OutputFile] = {}
    digests = {one.name: new_digest() for one in files}
    with contextlib.ExitStack() as stack:

        def runs_of(planned: PlannedFile) -> Iterator[_Run]:
            outputs[planned.name] = stack.enter_context(OutputFile(folder / planned.name))
            outputs[planned.name].write([planned.header], 0)
            digests[planned.name].update(planned.header)
            yield from _runs(tensors, planned)

        def write(run: _Run) -> tuple[_Run, list[BorrowedView]]:
            borrowed, position = [], run.position
            for slices in runs(run.slices, tensors.dtype(run.name).itemsize, BLOCK_BYTES):
                borrowed.append(tensors.borrow(run.name, slices))
                outputs[run.file].write([raw(borrowed[-1].bits)], position)
                position += borrowed[-1].bits.nbytes
            return run, borrowed

        for run, borrowed in workers.map(write, in_turn(runs_of(one) for one in files)):
            for view in borrowed:
                digests[run.file].update(raw(view.bits))
                advance(view.bits.nbytes)
                view.release()
            if run.last:
                outputs[run.file].close()
                finished(run.file, digests[run.file].hexdigest())


def _runs(tensors: LazyTensors, planned: PlannedFile) -> Iterator[_Run]:
    position = len(planned.header)
    for name in planned.tensors:
        item = tensors.dtype(name).itemsize
        for slices in runs(whole(tensors.shape(name)), item, _RUN_BYTES):
            size = volume(slices) * item
            last = name == planned.tensors[-1] and all(
                one.stop == size_of for one, size_of in zip(slices, tensors.shape(name), strict=True)
            )
            yield _Run(planned.name, name, slices, position, last)
            position += size


def _plan(file: str, tensors: LazyTensors, names: Sequence[str]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        size = _bytes(tensors, name)
        code = tensors.dtype(name).code
        if code not in CODES:
            raise CheckpointError(f"{name}: {tensors.dtype(name)} cannot be exported. Convert it first.")
        header[name] = {"dtype": code, "shape": list(tensors.shape(name)), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of eight, as other writers have it
    return PlannedFile(file, tuple(names), len(text).to_bytes(8, "little") + text, offset)


def _bytes(tensors: LazyTensors, name: str) -> int:
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize
