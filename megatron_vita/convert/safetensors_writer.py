"""Folders of safetensors, written block by block by several threads; the bytes do not depend on how many.

Files are the unit that a killed conversion keeps: each is noted in the journal, with its digest, once it is complete.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.journal import Entry, Journal, sync
from megatron_vita.checkpoint.lazy import LazyTensors, Loan, Region, runs, volume, whole
from megatron_vita.checkpoint.streams import (
    ALGORITHM,
    BLOCK_BYTES,
    OutputFile,
    Workers,
    digest_of,
    new_digest,
    raw,
)
from megatron_vita.convert.safetensors_folder import CODES, INDEX_FILE, SINGLE_FILE
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9
_RUN_BYTES = 16 << 20
"""What one thread reads and writes before another hashes it: one piece of a checkpoint, which is read whole."""


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
        advance: is told the bytes that are done.

    Returns:
        Digest of each file of weights.

    Raises:
        OSError: no space.
        CheckpointError: the tensors cannot be read.
    """
    digests: dict[str, str] = {}
    for one in files:

        def intact(path: Path, entry: Entry, size: int = one.size) -> bool:
            return path.stat().st_size == size and entry.get(ALGORITHM) == digest_of(path, 0, size)

        kept = journal.kept(one.name, intact)
        if kept is None:
            digests[one.name] = _write_file(journal.staging / one.name, tensors, one, workers, advance)
            journal.add(one.name, {ALGORITHM: digests[one.name]})
        else:
            log.info("%s was finished by an earlier run and is kept", one.name)
            digests[one.name] = str(kept[ALGORITHM])
            advance(one.data_bytes)
        if durable:
            sync(journal.staging / one.name)
    if files[0].name != SINGLE_FILE:
        index = {
            "metadata": {"total_size": sum(one.data_bytes for one in files)},
            "weight_map": {name: one.name for one in files for name in one.tensors},
        }
        (journal.staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


@dataclass(frozen=True)
class _Run:
    """Some elements of one tensor, and where they lie in the file."""

    name: str
    region: Region
    position: int


def _write_file(
    path: Path, tensors: LazyTensors, planned: PlannedFile, workers: Workers, advance: Callable[[int], object]
) -> str:
    """Threads read and write; this one hashes what they have written, in order. Returns the file's digest."""
    digest = new_digest()
    digest.update(planned.header)
    with OutputFile(path) as file:
        file.write([planned.header], 0)

        def write(run: _Run) -> list[Loan]:
            loans, position = [], run.position
            for region in runs(run.region, tensors.dtype(run.name).itemsize, BLOCK_BYTES):
                loans.append(tensors.lend(run.name, region))
                file.write([raw(loans[-1].bits)], position)
                position += loans[-1].bits.nbytes
            return loans

        for loans in workers.map(write, _runs(tensors, planned)):
            for loan in loans:
                digest.update(raw(loan.bits))
                advance(loan.bits.nbytes)
                loan.release()
    return digest.hexdigest()


def _runs(tensors: LazyTensors, planned: PlannedFile) -> Iterator[_Run]:
    position = len(planned.header)
    for name in planned.tensors:
        item = tensors.dtype(name).itemsize
        for region in runs(whole(tensors.shape(name)), item, _RUN_BYTES):
            yield _Run(name, region, position)
            position += volume(region) * item


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
