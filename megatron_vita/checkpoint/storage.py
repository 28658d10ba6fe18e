"""The bytes of a checkpoint: torch's distributed-checkpoint layout, written piece by piece and read with distrust.

A rank writes the parts of tensors it is answerable for into `__RANK_0.distcp`, one torch.save after the other; the file
`.metadata` says which part of which tensor lies where. This is what megatron-core's `torch_dist` format is, and its own
loader reads it. megatron-core's writer is not used, because it starts a helper process (2 to 5 s a rank, and it
outlives a killed rank) to write asynchronously; ours writes in the calling thread and hashes each piece as it passes.
torch's formats are spoken without torch (archive.py, metadata.py), which takes longer to import than to convert with.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita.checkpoint.archive import frame, tensor_in
from megatron_vita.checkpoint.dtypes import Bits, DType, bits_of, dtype_of
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.lazy import (
    LazyTensors,
    Loan,
    Region,
    box,
    extent,
    overlap,
    part,
    runs,
    shift,
    volume,
    whole,
)
from megatron_vita.checkpoint.metadata import StoredPiece, StoredTensor, metadata_bytes, parse_metadata
from megatron_vita.checkpoint.streams import (
    BLOCK_BYTES,
    Buffers,
    Bytes,
    OutputFile,
    new_digest,
    raw,
    read_exactly,
    shaped,
)
from megatron_vita.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
"""megatron-core's marker of a distributed checkpoint."""
PIECE_BYTES = 16 << 20
"""Large tensors are written in runs of rows of about this size, so that a reader of a part need not read it all."""
_CACHE_BYTES = 128 << 20
"""Verified pieces that are kept for the next reads: interleaved heads are cut from one piece many times in a row. More
are kept where one row of a tensor lies in more: see CheckpointTensors._make_room."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class WrittenPiece:
    """One part of one tensor as it was written."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: DType
    file: str
    position: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""
    digest: str
    """Digest of these bytes (streams.ALGORITHM)."""


@dataclass(frozen=True)
class Piece:
    """One part of one tensor that is to be written."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


def write_pieces(folder: Path, file_name: str, pieces: Iterable[Piece]) -> list[WrittenPiece]:
    """Write pieces one after the other into one file, each read from the iterable only when its turn comes, and cut
    into smaller ones where it is large.

    Returns:
        What was written, in file order; empty, and no file, if there was nothing to write.
    """
    written: list[WrittenPiece] = []
    with contextlib.ExitStack() as stack:
        file, position = None, 0
        for piece in pieces:
            if file is None:
                file = stack.enter_context(OutputFile(folder / file_name))
            data, dtype = piece.data.detach().cpu().contiguous(), dtype_of(piece.data)
            for region in runs(whole(data.shape), dtype.itemsize, PIECE_BYTES):
                head, tail = frame(extent(region), dtype)
                parts: list[bytes | memoryview] = [head, raw(part(bits_of(data), region)), tail]
                digest = new_digest()
                for one in parts:
                    digest.update(one)
                file.write(parts, position)
                written.append(
                    WrittenPiece(
                        key=piece.key,
                        global_shape=tuple(piece.global_shape),
                        offsets=tuple(first + one.start for first, one in zip(piece.offsets, region, strict=True)),
                        sizes=extent(region),
                        dtype=dtype,
                        file=file_name,
                        position=position,
                        length=sum(map(len, parts)),
                        digest=digest.hexdigest(),
                    )
                )
                position += written[-1].length
        if file is not None:
            file.sync()
    return written


def write_metadata(folder: Path, pieces: Sequence[WrittenPiece]) -> None:
    """Write `.metadata` over the pieces of all ranks, once they are proved to make up every tensor exactly.

    Raises:
        CheckpointError: pieces of one tensor disagree about its shape or dtype, overlap, or leave a gap.
    """
    by_key: dict[str, list[WrittenPiece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    tensors: dict[str, StoredTensor] = {}
    for key, parts in by_key.items():
        first = parts[0]
        if any(one.global_shape != first.global_shape or one.dtype != first.dtype for one in parts):
            kinds = sorted({f"{tuple(one.global_shape)} {one.dtype}" for one in parts})
            raise CheckpointError(f"{key}: ranks disagree about its shape: {', '.join(kinds)}.")
        starts = {one.offsets for one in parts}
        held = sum(volume(box(one.offsets, one.sizes)) for one in parts)
        if len(starts) != len(parts) or held != volume(whole(first.global_shape)):
            raise CheckpointError(f"{key}: its parts hold {held} elements, its shape is {first.global_shape}.")
        stored = tuple(StoredPiece(one.offsets, one.sizes, one.file, one.position, one.length) for one in parts)
        tensors[key] = StoredTensor(first.global_shape, first.dtype, stored)
    (folder / METADATA_FILE).write_bytes(metadata_bytes(tensors))
    (folder / FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")


@dataclass(eq=False)
class _Cached:
    """A piece in memory, or being read."""

    content: Future[tuple[Bytes, Bits]] = field(default_factory=Future)
    users: int = 0
    """Threads that look into it, or will."""
    kept: bool = True
    """Whether it is still there for the next who asks."""


class CheckpointTensors(LazyTensors):
    """The tensors of one checkpoint folder, by key and whole, in one process and without any process group.

    Only pieces that overlap a wanted region are read, and each is verified when it is read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder is no finished checkpoint or its metadata cannot be trusted."""
        self.folder = folder
        self.integrity = Integrity.read(folder)
        self._tensors = parse_metadata(self.integrity.read_file(METADATA_FILE), folder / METADATA_FILE)
        self._lock = threading.Lock()
        self._cache: OrderedDict[StoredPiece, _Cached] = OrderedDict()
        self._limit = _CACHE_BYTES
        self._roomy: set[str] = set()
        """Tensors that the limit allows for."""
        self._buffers = Buffers(_CACHE_BYTES)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> DType:
        return self._tensors[name].dtype

    def read_into(self, name: str, region: Region, out: Bits) -> None:
        for stored in self._tensors[name].pieces:
            held = box(stored.offsets, stored.sizes)
            shared = overlap(held, region)
            if shared is None:
                continue
            cached = self._take(name, stored)
            try:
                _, bits = cached.content.result()
                part(out, shift(shared, region))[...] = part(bits, shift(shared, held))
            finally:
                self._give(cached)

    def lend(self, name: str, region: Region) -> Loan:
        for stored in self._tensors[name].pieces:
            held = box(stored.offsets, stored.sizes)
            if overlap(held, region) != region:
                continue
            cached = self._take(name, stored)
            try:
                bits = part(cached.content.result()[1], shift(region, held))
            except BaseException:
                self._give(cached)
                raise
            if bits.flags.c_contiguous:
                return Loan(bits, functools.partial(self._give, cached))
            self._give(cached)
        return super().lend(name, region)

    def _take(self, name: str, stored: StoredPiece) -> _Cached:
        """A verified piece, to be given back; who asks for one that another thread is reading waits for its result."""
        with self._lock:
            self._make_room(name)
            cached = self._cache.get(stored)
            mine = cached is None
            if cached is None:
                cached = self._cache[stored] = _Cached()
            cached.users += 1
            self._cache.move_to_end(stored)
            self._forget()
        if mine:
            try:
                cached.content.set_result(self._read_piece(name, stored))
            except BaseException as error:
                with self._lock:
                    self._cache.pop(stored, None)
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
        total = sum(stored.length for stored in self._cache)
        while len(self._cache) > 1 and total > self._limit:
            stored, cached = self._cache.popitem(last=False)
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
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for start in range(0, stored.length, BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                read_exactly(descriptor, block, stored.position + start, path)
                digest.update(block)
        finally:
            os.close(descriptor)
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
