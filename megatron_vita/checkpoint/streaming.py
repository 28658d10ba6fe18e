"""Tensor files of a checkpoint, written block by block at places known beforehand, by several threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.checkpoint.archive import frame
from megatron_vita.checkpoint.dtypes import DType
from megatron_vita.checkpoint.lazy import LazyTensors, Slices, extent, runs, volume, whole
from megatron_vita.checkpoint.storage import PIECE_BYTES, WrittenPiece
from megatron_vita.checkpoint.streams import (
    BLOCK_BYTES,
    MAX_WORKERS,
    Buffers,
    OutputFile,
    Workers,
    in_turn,
    raw,
    shaped,
)
from megatron_vita.files import new_digest

FILE_BYTES = 1 << 30
"""A conversion that was killed repeats at most the files it was in."""


@dataclass(frozen=True)
class PlannedPiece:
    """One part of one tensor, and where it will lie in its file."""

    key: str
    global_shape: tuple[int, ...]
    slices: Slices
    dtype: DType
    position: int

    @property
    def length(self) -> int:
        """Bytes in the file."""
        head, tail = frame(extent(self.slices), self.dtype)
        return len(head) + volume(self.slices) * self.dtype.itemsize + len(tail)

    def written(self, file: str, digest: str) -> WrittenPiece:
        """The same, once it has been written."""
        return WrittenPiece(
            key=self.key,
            global_shape=self.global_shape,
            offsets=tuple(one.start for one in self.slices),
            sizes=extent(self.slices),
            dtype=self.dtype,
            file=file,
            position=self.position,
            length=self.length,
            digest=digest,
        )


def stream_files(
    folder: Path,
    files: Mapping[str, Sequence[PlannedPiece]],
    tensors: LazyTensors,
    workers: Workers,
    advance: Callable[[int], object],
    finished: Callable[[str, list[str]], object],
) -> None:
    """Write files block by block, some of them side by side. The bytes do not depend on the number of workers.

    Args:
        files: pieces by file name.
        advance: is told the bytes of each piece once it is written.
        finished: is told each complete file, and the digests of its pieces in their order.

    Raises:
        OSError: no space.
    """
    buffers = Buffers(most=MAX_WORKERS * BLOCK_BYTES)
    outputs: dict[str, OutputFile] = {}
    with contextlib.ExitStack() as stack:

        def pieces_of(name: str) -> Iterator[tuple[str, PlannedPiece]]:
            outputs[name] = stack.enter_context(OutputFile(folder / name))
            for piece in files[name]:
                yield name, piece

        def write(item: tuple[str, PlannedPiece]) -> tuple[str, int, str]:
            (name, piece), file = item, outputs[item[0]]
            head, tail = frame(extent(piece.slices), piece.dtype)
            digest = new_digest()
            digest.update(head)
            file.write([head], piece.position)
            position = piece.position + len(head)
            for slices in runs(piece.slices, piece.dtype.itemsize, BLOCK_BYTES):
                size = volume(slices) * piece.dtype.itemsize
                buffer = buffers.take(size)
                block = shaped(buffer, extent(slices), piece.dtype)
                tensors.read_into(piece.key, slices, block)
                digest.update(raw(block))
                file.write([raw(block)], position)
                position += size
                buffers.give(buffer)
            digest.update(tail)
            file.write([tail], position)
            return name, piece.length, digest.hexdigest()

        digests: dict[str, list[str]] = {name: [] for name in files}
        for name, length, digest in workers.map(write, in_turn(pieces_of(name) for name in files)):
            digests[name].append(digest)
            advance(length)
            if len(digests[name]) == len(files[name]):
                outputs[name].close()
                finished(name, digests[name])


def plan_files(tensors: LazyTensors) -> dict[str, list[PlannedPiece]]:
    """Where every piece will lie, by file name: a pure function of names, shapes and types."""
    files: dict[str, list[PlannedPiece]] = {}
    position = FILE_BYTES
    for key in tensors:
        shape, dtype = tensors.shape(key), tensors.dtype(key)
        for slices in _pieces(shape, dtype.itemsize):
            if position >= FILE_BYTES:
                position = 0
                current = files.setdefault(f"__0_{len(files)}.distcp", [])
            current.append(PlannedPiece(key, shape, slices, dtype, position))
            position += current[-1].length
    return files


def _pieces(shape: tuple[int, ...], item_size: int) -> Iterator[Slices]:
    """Rows of the first dimension that is not 1."""
    yield from runs(whole(shape), item_size, PIECE_BYTES)
