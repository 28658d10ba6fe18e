"""The tensors of a checkpoint folder, read with distrust: only pieces that are wanted, each verified as it is read."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, extent, overlap, shift
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.metadata import METADATA_FILE, StoredPiece, StoredTensor, parse_metadata
from megatron_vita.checkpoint.streams import read_exactly, reading
from megatron_vita.checkpoint.tensors import LazyTensors, bytes_of, slice_of
from megatron_vita.errors import CheckpointError
from megatron_vita.files import BLOCK_BYTES, new_digest

_CACHE_BYTES = 128 << 20
"""Pieces that are kept, because interleaved heads are cut from one piece many times in a row."""
_HEAD_BYTES = 1 << 10


class CheckpointTensors(LazyTensors):
    """The tensors of one checkpoint folder, by key and whole, in one process and without any process group."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Args: check: verify all other files of the folder now (Integrity.read).

        Raises:
            CheckpointError: the folder is no finished checkpoint, or its metadata cannot be trusted.
        """
        self.folder = folder
        self.integrity = Integrity.read(folder, check=check)
        self.stored: dict[str, StoredTensor] = parse_metadata(
            self.integrity.read_file(METADATA_FILE), folder / METADATA_FILE
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, int, int], Future[Tensor]] = OrderedDict()
        self._limit = _CACHE_BYTES

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.stored[name].dtype

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        for piece in self.stored[name].pieces:
            shared = overlap(piece.box, slices)
            if shared is not None:
                content = slice_of(self._cached(name, piece), shift(shared, piece.box))
                slice_of(out, shift(shared, slices)).copy_(content)

    def _cached(self, name: str, piece: StoredPiece) -> Tensor:
        """A verified piece; who asks for one that another thread is reading waits for its result."""
        key = (name, piece.position, id(piece))
        with self._lock:
            self._make_room(name)
            found = self._cache.get(key)
            mine = found is None
            if found is None:
                found = self._cache[key] = Future()
            self._cache.move_to_end(key)
        if mine:
            try:
                found.set_result(self.read_piece(name, piece))
            except BaseException as error:
                with self._lock:
                    self._cache.pop(key, None)  # the next who asks tries again
                found.set_exception(error)
            with self._lock:
                self._forget()
        return found.result()

    def _make_room(self, name: str) -> None:
        """Allow for two rows of pieces of a tensor, of which one thread may read the end of the first and another the
        begin of the second. A row is as many as ranks have cut its columns, and if they pushed each other out of
        memory, each would be read again for every block. Two rows are less than two tensors, whatever wrote them."""
        rows: Counter[tuple[int, ...]] = Counter()
        for piece in self.stored[name].pieces:
            rows[tuple(one.start for one in piece.box[:1])] += piece.length
        self._limit = max(_CACHE_BYTES, 2 * max(rows.values()))

    def _forget(self) -> None:
        """Let go of the oldest pieces beyond the limit."""
        sizes = {key: one.result().nbytes for key, one in self._cache.items() if one.done() and not one.exception()}
        total = sum(sizes.values())
        for key in list(sizes)[:-1]:
            if total <= self._limit:
                break
            total -= sizes[key]
            del self._cache[key]

    def read_piece(self, name: str, piece: StoredPiece, out: Tensor | None = None) -> Tensor:
        """Read one piece and verify it.

        Args:
            out: contiguous CPU tensor of the piece's shape and type to read it into; by default a new one. What it
                holds after an error is undefined.

        Returns:
            Its elements.

        Raises:
            DamagedError: it is not what was written.
            CheckpointError: what was written is no such part of the tensor.
        """
        path = self.folder / piece.file
        self.integrity.check_piece(piece.file, piece.position, piece.length, None, name)
        out = torch.empty(extent(piece.box), dtype=self.dtype(name)) if out is None else out
        elements, digest = bytes_of(out).numpy().data, new_digest()
        with reading(path) as descriptor:
            start = _elements_at(_Part(descriptor, piece, path), out.nbytes)
            position = piece.position
            parts: tuple[bytearray | memoryview, ...]
            if start is None:
                parts = (bytearray(piece.length),)  # of which only the digest is wanted: is it damaged?
            else:
                parts = (bytearray(start), elements, bytearray(piece.length - start - out.nbytes))
            for part in parts:
                for begin in range(0, len(part), BLOCK_BYTES):
                    block = memoryview(part)[begin : begin + BLOCK_BYTES]
                    read_exactly(descriptor, block, position, path)
                    digest.update(block)
                    position += len(block)
        self.integrity.check_piece(piece.file, piece.position, piece.length, digest.hexdigest(), name)
        if start is None:
            raise CheckpointError(
                f"{path}: the part for {name} has another shape or type than promised. Do not use this checkpoint."
            )
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _elements_at(part: _Part, size: int) -> int | None:
    """Where `size` bytes of elements lie in what torch.save wrote of one tensor: a zip archive, in which the record
    NAME/data/0 holds them uncompressed. The pickled part beside it is not looked at. None if there is no such record.
    """
    try:
        return _in_order(part, size) or _by_directory(part, size)
    except (zipfile.BadZipFile, StopIteration, struct.error, ValueError, LookupError, NotImplementedError, EOFError):
        return 0 if size == 0 else None  # a tensor without elements needs no record


def _in_order(part: _Part, size: int) -> int | None:
    """The same where the record's header stands in the first bytes, and its end mark behind the elements: so writes
    torch.save, and reading an archive's directory takes longer than reading a small piece."""
    head = part.read(_HEAD_BYTES)
    name = head.find(b"/data/0")
    header = head.rfind(b"PK\x03\x04", 0, max(name, 0))
    if header < 0:
        return None
    (method,), (length, extra) = (
        struct.unpack_from("<H", head, header + 8),
        struct.unpack_from("<HH", head, header + 26),
    )
    start = header + 30 + int(length) + int(extra)
    part.seek(start + size)
    return start if method == 0 and start - extra == name + 7 and part.read(4) == b"PK\x07\x08" else None


def _by_directory(part: _Part, size: int) -> int | None:
    with zipfile.ZipFile(cast(IO[bytes], part)) as archive:
        record = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
        part.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", part.read(4))
    start = record.header_offset + 30 + int(name) + int(extra)
    stored = record.compress_type == zipfile.ZIP_STORED and record.file_size == size
    return start if stored and 0 <= start <= part.length - size else None


class _Part:
    """A piece as a file of its own: what zipfile asks of one."""

    def __init__(self, descriptor: int, piece: StoredPiece, where: Path) -> None:
        self._descriptor, self._begin, self._where = descriptor, piece.position, where
        self._at, self.length = 0, piece.length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self._at)
        content = bytearray(left if size < 0 else min(size, left))
        read_exactly(self._descriptor, memoryview(content), self._begin + self._at, self._where)
        self._at += len(content)
        return bytes(content)
