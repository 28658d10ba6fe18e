"""Tensor files of a checkpoint, written block by block at places known beforehand, by several threads."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vita.checkpoint.lazy import LazyTensors, Region, extent, runs, volume, whole
from megatron_vita.checkpoint.storage import WrittenPiece
from megatron_vita.checkpoint.streams import BLOCK_BYTES, Workers, raw, shaped, write_exactly

PIECE_BYTES = 16 << 20
"""Large tensors are written in runs of rows of about this size, so that a reader of a part need not read it all. The
memory of one this small is reused after it was freed; a larger one is new to the system, and costs its page faults."""
FILE_BYTES = 2 << 30
"""A conversion that was killed repeats at most the file it was in."""


@functools.lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the elements of a contiguous tensor: the same for all values.

    The archive's CRC-32 is left out, as torch.serialization.skip_data leaves it: torch does not read it, and our pieces
    have SHA-256.
    """
    data = torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "archive"  # its name is in the bytes; a stream's is the same
        with torch.serialization.skip_data():
            torch.save(data, path)
        start = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/0")  # type: ignore[attr-defined]
        with path.open("rb") as file:
            head = file.read(start)
            file.seek(start + data.nbytes)
            return head, file.read()


@dataclass(frozen=True)
class PlannedPiece:
    """One part of one tensor, and where it will lie in its file."""

    key: str
    global_shape: tuple[int, ...]
    region: Region
    dtype: torch.dtype
    position: int

    @property
    def length(self) -> int:
        """Bytes in the file."""
        head, tail = frame(extent(self.region), self.dtype)
        return len(head) + volume(self.region) * self.dtype.itemsize + len(tail)

    def written(self, file: str, sha256: str) -> WrittenPiece:
        """The same, once it has been written."""
        return WrittenPiece(
            key=self.key,
            global_shape=self.global_shape,
            offsets=tuple(one.start for one in self.region),
            sizes=extent(self.region),
            dtype=self.dtype,
            file=file,
            position=self.position,
            length=self.length,
            sha256=sha256,
        )


def stream_pieces(path: Path, tensors: LazyTensors, pieces: Sequence[PlannedPiece], workers: Workers) -> list[str]:
    """Write one file, block by block, in any order of its pieces. The bytes do not depend on the number of workers.

    Returns:
        SHA-256 of each piece, in the order given.

    Raises:
        OSError: no space.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:

        def write(piece: PlannedPiece) -> str:
            head, tail = frame(extent(piece.region), piece.dtype)
            digest = hashlib.sha256(head)
            write_exactly(descriptor, [head], piece.position)
            position = piece.position + len(head)
            for region in runs(piece.region, piece.dtype.itemsize, BLOCK_BYTES):
                size = volume(region) * piece.dtype.itemsize
                buffer = workers.take(size)
                block = shaped(buffer, extent(region), piece.dtype)
                tensors.read_into(piece.key, region, block)
                digest.update(raw(block))
                write_exactly(descriptor, [raw(block)], position)
                position += size
                workers.give(buffer)
            digest.update(tail)
            write_exactly(descriptor, [tail], position)
            return digest.hexdigest()

        return list(workers.map(write, pieces))
    finally:
        os.close(descriptor)


def plan_files(tensors: LazyTensors) -> dict[str, list[PlannedPiece]]:
    """Where every piece will lie, by file name: a pure function of names, shapes and types."""
    files: dict[str, list[PlannedPiece]] = {}
    position = FILE_BYTES
    for key in tensors:
        shape, dtype = tensors.shape(key), tensors.dtype(key)
        for region in _pieces(shape, dtype.itemsize):
            if position >= FILE_BYTES:
                position = 0
                current = files.setdefault(f"__0_{len(files)}.distcp", [])
            current.append(PlannedPiece(key, shape, region, dtype, position))
            position += current[-1].length
    return files


def _pieces(shape: tuple[int, ...], item_size: int) -> Iterator[Region]:
    """Rows of the first dimension that is not 1."""
    yield from runs(whole(shape), item_size, PIECE_BYTES)
