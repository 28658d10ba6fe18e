"""megatron-core's indexed container, written from arrays: its index for millions of sequences without a Python loop.

Layout of an .idx file (megatron/core/datasets/indexed_dataset.py, `_IndexWriter`): magic, version, dtype code, number
of sequences, number of document bounds; then lengths (int32), byte offsets (int64) and document bounds (int64).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vita.layout import Int64

HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
MAGIC = b"MMIDIDX\0\0"
CODES: dict[type[np.integer], int] = {np.uint8: 1, np.int32: 4}
"""megatron-core's numbers for the element types that are used here (`DType`)."""


@dataclass(frozen=True, slots=True)
class IndexFile:
    """Where things stand in an index of known size, so that processes can write their parts of it."""

    dtype: type[np.integer]
    sequences: int
    documents: int

    @property
    def lengths_at(self) -> int:
        """Offset of the lengths."""
        return HEADER.itemsize

    @property
    def pointers_at(self) -> int:
        """Offset of the byte offsets."""
        return self.lengths_at + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """Offset of the document bounds, of which there is one more than documents."""
        return self.pointers_at + 8 * self.sequences

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.documents_at + 8 * (self.documents + 1)

    def create(self, path: Path, bounds: Int64) -> None:
        """Make the file with everything but lengths and offsets.

        Args:
            path: the .idx file.
            bounds: first sequence of each document, and the number of sequences; `[documents + 1]`.
        """
        header = np.array([(MAGIC, 1, CODES[self.dtype], self.sequences, self.documents + 1)], dtype=HEADER)
        with path.open("wb") as stream:
            stream.truncate(self.size)
            stream.write(header.tobytes())
            stream.seek(self.documents_at)
            stream.write(np.ascontiguousarray(bounds, dtype="<i8").data)

    def write(self, descriptor: int, first: int, start: int, lengths: npt.NDArray[np.integer]) -> int:
        """Write the entries of consecutive sequences.

        Args:
            descriptor: of the file, open for writing.
            first: number of the first sequence.
            start: byte offset of its data.
            lengths: elements of each sequence.

        Returns:
            Byte offset behind the last one's data.
        """
        sizes = lengths.astype(np.int64) * np.dtype(self.dtype).itemsize
        ends = start + np.cumsum(sizes)
        write_at(descriptor, lengths.astype("<i4").tobytes(), self.lengths_at + 4 * first)
        write_at(descriptor, (ends - sizes).astype("<i8").tobytes(), self.pointers_at + 8 * first)
        return int(ends[-1]) if len(ends) else start


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place of a file. (`os.pwrite` may write less, at most 2 GiB.)"""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def blocks(rows: int, size: int = 1 << 20) -> Iterator[slice]:
    """Slices that cut a long table into parts which fit into memory."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
