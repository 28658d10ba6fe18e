"""The records and file names of the packed format, and what its cost column counts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_vita.files import write_at
from megatron_vita.layout import Int64

TILE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "pack",
            "first_token",  # counted from the pack's start
            "tokens",
            "media",  # sequence of the media container
            "row",
            "col",
            "rows",
            "cols",
            "thumbnail",
            "width",  # pixels of the whole picture, upright
            "height",
            "frame",  # 1: a video frame
        )
    ]
)
"""One record of the tiles file, which is ordered by pack, then by token."""

SAMPLE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "source",  # index into the manifest's sources
            "line",
            "length",
            "tiles",
            "cost",  # see sample_cost; for people (inspect_data --pack): training asks pack_work
            "labels",  # tokens that carry loss
            "shortened",  # 1: text was cut or frames were dropped to fit the sequence
            "cleaned",  # answers that lost leading line breaks
            "dropped",  # turns that the repairs of its dataset removed
        )
    ]
)
"""One record of the samples file: one Example, in the order of the token container's sequences."""

SUFFIXES = (
    "tokens.bin",
    "tokens.idx",
    "labels.bin",
    "labels.idx",
    "media.bin",
    "media.idx",
    "tiles.npy",
    "samples.npy",
    "crc32.npy",
    "rejects.jsonl",
)
"""Every file of a set but its manifest; a set without media lacks the media and tiles files."""
MEDIA_SUFFIXES = ("media.bin", "media.idx", "tiles.npy")
SMALL_SUFFIXES = ("tokens.idx", "labels.idx", "media.idx", "tiles.npy", "samples.npy", "crc32.npy")
"""Files that describe the others; small enough to be proven whenever a set is opened."""
REFERENCE = b"ref:"
"""First bytes of a media item that is a path instead of a picture (no picture format begins so)."""


def attention_pairs(length: npt.ArrayLike) -> Int64:
    """Query-key pairs of a causal document of that many tokens."""
    tokens = np.asarray(length, dtype=np.int64)
    return tokens * (tokens + 1) // 2


def sample_cost(length: npt.ArrayLike, tiles: npt.ArrayLike, tokens_per_tile: int) -> Int64:
    """Work that differs between packs of one length, in query-key pairs of the decoder: attention and tower.

    What is linear in tokens is the same for every (padded) pack: not counted. One tile through InternViT-300M weighs as
    much as 10 * 256^2 pairs of a 14-billion decoder; the same factor is used at every size.
    """
    return attention_pairs(length) + np.asarray(tiles, dtype=np.int64) * (10 * tokens_per_tile**2)


class GrowingTable:
    """A .npy file of records that grows at its end, so that no table is ever held in memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = dtype
        self.rows = 0
        self._file.write(npy_header(dtype, 0))

    def append(self, records: npt.NDArray[Any]) -> None:
        """Write records behind those that are there."""
        self._file.write(records.tobytes())
        self.rows += len(records)

    def finish(self) -> None:
        """Fill in the count and close. numpy reserves space for a growing first axis: the header keeps its length."""
        self._file.seek(0)
        self._file.write(npy_header(self._dtype, self.rows))
        self._file.close()


def npy_header(dtype: np.dtype, rows: int) -> bytes:
    """What stands before the records of a .npy file of one axis."""
    header = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


def starts(counts: npt.NDArray[np.int64]) -> Int64:
    """Where each of several runs begins when they are laid end to end, and their total; int64 `[n + 1]`."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def blocks(rows: int, size: int = 1 << 20) -> Iterator[slice]:
    """Slices that cut a long table into parts which fit into memory."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


# ---- megatron-core's indexed container ----
#
# Its index for millions of sequences without a Python loop. Layout of an .idx file (`_IndexWriter` of
# megatron/core/datasets/indexed_dataset.py): magic, version, dtype code, number of sequences, number of document
# bounds; then lengths (int32), byte offsets (int64) and document bounds (int64).

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
