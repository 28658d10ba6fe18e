"""The tensors of a checkpoint folder, read with distrust: only pieces that are wanted, each verified when it is read.

(Writing: storage.py.) Pieces that were read stay for a while, because interleaved heads are cut from one piece many
times in a row. The memory of those that nobody wants or looks into any more is used again for the next ones.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vita.checkpoint.archive import frame, tensor_in
from megatron_vita.checkpoint.dtypes import Bits, DType
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.lazy import BorrowedView, LazyTensors, Slices, overlap, shift, slice_of, slices_at
from megatron_vita.checkpoint.metadata import StoredPiece, parse_metadata
from megatron_vita.checkpoint.storage import METADATA_FILE
from megatron_vita.checkpoint.streams import BLOCK_BYTES, Buffers, Bytes, raw, read_exactly, reading, shaped
from megatron_vita.errors import CheckpointError
from megatron_vita.files import new_digest

_CACHE_BYTES = 128 << 20
"""Pieces that are kept. More are kept where one row of a tensor lies in more: see CheckpointTensors._make_room."""


@dataclass(eq=False)
class _Cached:
    """A piece in memory, or being read."""

    content: Future[tuple[Bytes, Bits]] = field(default_factory=Future)
    users: int = 0
    """Threads that look into it, or will."""
    kept: bool = True
    """Whether it is still there for the next who asks."""


_Key = tuple[str, StoredPiece]
"""A piece of a tensor, by name: a hostile `.metadata` may say that two tensors of different types share a piece."""


class CheckpointTensors(LazyTensors):
    """The tensors of one checkpoint folder, by key and whole, in one process and without any process group.

    Only pieces that overlap a requested slice are read, and each is verified when it is read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder is no finished checkpoint or its metadata cannot be trusted."""
        self.folder = folder
        self.integrity = Integrity.read(folder)
        self._tensors = parse_metadata(self.integrity.read_file(METADATA_FILE), folder / METADATA_FILE)
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, _Cached] = OrderedDict()
        self._limit = _CACHE_BYTES
        self._roomy: set[str] = set()
        """Tensors that the limit allows for."""
        self._buffers = Buffers(_CACHE_BYTES)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> DType:
        return self._tensors[name].dtype

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        for stored in self._tensors[name].pieces:
            held = slices_at(stored.offsets, stored.sizes)
            shared = overlap(held, slices)
            if shared is None:
                continue
            cached = self._take(name, stored)
            try:
                _, bits = cached.content.result()
                slice_of(out, shift(shared, slices))[...] = slice_of(bits, shift(shared, held))
            finally:
                self._give(cached)

    def borrow(self, name: str, slices: Slices) -> BorrowedView:
        for stored in self._tensors[name].pieces:
            held = slices_at(stored.offsets, stored.sizes)
            if overlap(held, slices) != slices:
                continue
            cached = self._take(name, stored)
            bits = slice_of(cached.content.result()[1], shift(slices, held))  # one that failed holds no memory to give
            if bits.flags.c_contiguous:
                return BorrowedView(bits, functools.partial(self._give, cached))
            self._give(cached)
        return super().borrow(name, slices)

    def _take(self, name: str, stored: StoredPiece) -> _Cached:
        """A verified piece, to be given back; who asks for one that another thread is reading waits for its result."""
        with self._lock:
            self._make_room(name)
            cached = self._cache.get((name, stored))
            mine = cached is None
            if cached is None:
                cached = self._cache[name, stored] = _Cached()
            cached.users += 1
            self._cache.move_to_end((name, stored))
            self._forget()
        if mine:
            try:
                cached.content.set_result(self._read_piece(name, stored))
            except BaseException as error:
                with self._lock:  # the next who asks tries again; if it was pushed out, another may do so already
                    if cached.kept:
                        del self._cache[name, stored]
                        cached.kept = False
                cached.content.set_exception(error)
        return cached

    def _give(self, cached: _Cached) -> None:
        with self._lock:
            cached.users -= 1
            self._reuse(cached)

    def _make_room(self, name: str) -> None:
        """Allow for two rows of pieces of a tensor, of which one thread may read the end of the first and another the
        begin of the second. A row is as many as ranks have cut its columns, and if they pushed each other out of
        memory, each would be read again for every block. Two rows are less than two tensors, whatever wrote them."""
        if name in self._roomy:
            return
        rows: Counter[tuple[int, ...]] = Counter()
        for stored in self._tensors[name].pieces:
            rows[stored.offsets[:1]] += stored.length
        self._limit = max(self._limit, 2 * max(rows.values()))
        self._roomy.add(name)

    def _forget(self) -> None:
        """Let go of the oldest pieces, so that all that are kept or being read are within the limit, or are one."""
        total = sum(stored.length for _, stored in self._cache)
        while len(self._cache) > 1 and total > self._limit:
            (_, stored), cached = self._cache.popitem(last=False)
            total -= stored.length
            cached.kept = False
            self._reuse(cached)

    def _reuse(self, cached: _Cached) -> None:
        """Give the memory of a piece that nobody keeps or looks into to the next one."""
        if not cached.kept and not cached.users and cached.content.exception() is None:
            self._buffers.give(cached.content.result()[0])

    def _read_piece(self, name: str, stored: StoredPiece) -> tuple[Bytes, Bits]:
        """(the memory it lies in, its elements)."""
        path = self.folder / stored.file
        if stored.file not in self.integrity.files:
            raise CheckpointError(f"{self.folder}: {name} is said to lie in {stored.file!r}, no part of it.")
        self.integrity.check_piece(stored.file, stored.position, stored.length, None, name)
        content, digest = self._buffers.take(stored.length), new_digest(self.integrity.algorithm)
        view = raw(content[: stored.length])
        with reading(path) as descriptor:
            for start in range(0, stored.length, BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                read_exactly(descriptor, block, stored.position + start, path)
                digest.update(block)
        self.integrity.check_piece(stored.file, stored.position, stored.length, digest.hexdigest(), name)
        return content, shaped(content[self._elements_at(name, stored, view) :], stored.sizes, self.dtype(name))

    def _elements_at(self, name: str, stored: StoredPiece, view: memoryview) -> int:
        """Where the elements lie in a piece: behind our frame, or wherever torch.save has put them."""
        dtype = self.dtype(name)
        head, tail = frame(stored.sizes, dtype)
        size = len(view) - len(head) - len(tail)
        if (
            size == math.prod(stored.sizes) * dtype.itemsize
            and view[: len(head)] == head
            and view[-len(tail) :] == tail
        ):
            return len(head)
        path = self.folder / stored.file
        start, shape, found = tensor_in(view, path)
        if shape != stored.sizes or found != dtype:
            raise CheckpointError(
                f"{path}: the part for {name} has another shape or type than promised. Do not use this checkpoint."
            )
        return start

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
