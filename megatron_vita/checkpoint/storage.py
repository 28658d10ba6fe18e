"""The bytes of a checkpoint: torch's distributed-checkpoint layout, written piece by piece and read with distrust.

A rank writes the parts of tensors it is answerable for into `__RANK_0.distcp`, one torch.save after the other; the file
`.metadata` says which part of which tensor lies where. This is what megatron-core's `torch_dist` format is, and its own
loader reads it. megatron-core's writer is not used, because it starts a helper process (2 to 5 s a rank, and it
outlives a killed rank) to write asynchronously; ours writes in the calling thread and hashes each piece as it passes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vita.checkpoint.inert import elements, parse_metadata
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.lazy import LazyTensors, Region, box, extent, overlap, shift, volume, whole
from megatron_vita.checkpoint.streams import BLOCK_BYTES, raw, read_exactly
from megatron_vita.errors import CheckpointError

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
"""megatron-core's marker of a distributed checkpoint."""
_CACHE_BYTES = 128 << 20
"""Verified pieces that are kept for the next reads: interleaved heads are cut from one piece many times in a row."""
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
    dtype: torch.dtype
    file: str
    position: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""
    sha256: str


@dataclass(frozen=True)
class Piece:
    """One part of one tensor that is to be written."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


class _Hashing(io.RawIOBase):
    """A stream that passes bytes on and hashes them."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self._target = target
        self.sha256 = hashlib.sha256()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        view = memoryview(block).cast("B")
        self.sha256.update(view)
        self.length += len(view)
        self._target.write(view)
        return len(view)


def write_pieces(folder: Path, file_name: str, pieces: Iterable[Piece]) -> list[WrittenPiece]:
    """Write pieces one after the other into one file, each read from the iterable only when its turn comes.

    Returns:
        What was written, in file order; empty, and no file, if there was nothing to write.
    """
    written: list[WrittenPiece] = []
    file = None
    try:
        for piece in pieces:
            if file is None:
                file = (folder / file_name).open("wb")
            position = file.tell()
            stream: Any = _Hashing(file)
            data = piece.data.detach().cpu()
            if data.untyped_storage().nbytes() != data.nbytes:  # a view would be saved with everything it looks into
                data = data.clone(memory_format=torch.contiguous_format)
            torch.save(data, stream)
            written.append(
                WrittenPiece(
                    key=piece.key,
                    global_shape=tuple(piece.global_shape),
                    offsets=tuple(piece.offsets),
                    sizes=tuple(data.shape),
                    dtype=data.dtype,
                    file=file_name,
                    position=position,
                    length=stream.length,
                    sha256=stream.sha256.hexdigest(),
                )
            )
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if file is not None:
            file.close()
    return written


def write_metadata(folder: Path, pieces: Sequence[WrittenPiece]) -> None:
    """Write `.metadata` over the pieces of all ranks, once they are proved to make up every tensor exactly.

    Raises:
        CheckpointError: pieces of one tensor disagree about its shape or dtype, overlap, or leave a gap.
    """
    by_key: dict[str, list[WrittenPiece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, parts in by_key.items():
        first = parts[0]
        if any(one.global_shape != first.global_shape or one.dtype != first.dtype for one in parts):
            kinds = sorted({f"{tuple(one.global_shape)} {one.dtype}" for one in parts})
            raise CheckpointError(f"{key}: ranks disagree about its shape: {', '.join(kinds)}.")
        starts = {one.offsets for one in parts}
        held = sum(volume(box(one.offsets, one.sizes)) for one in parts)
        if len(starts) != len(parts) or held != volume(whole(first.global_shape)):
            raise CheckpointError(f"{key}: its parts hold {held} elements, its shape is {first.global_shape}.")
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=first.dtype),
            size=torch.Size(first.global_shape),
            chunks=[ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in parts],
        )
        for index, one in enumerate(parts):
            places[MetadataIndex(key, one.offsets, index)] = _StorageInfo(one.file, one.position, one.length)
    metadata = Metadata(state_dict_metadata=tensors, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    (folder / FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")


class CheckpointTensors(LazyTensors):
    """The tensors of one checkpoint folder, by key and whole, in one process and without any process group.

    Only pieces that overlap a wanted region are read, and each is verified when it is read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder is no finished checkpoint or its metadata cannot be trusted."""
        self.folder = folder
        self.integrity = Integrity.read(folder)
        metadata = parse_metadata(self.integrity.read_file(METADATA_FILE), folder / METADATA_FILE)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: one for key, one in metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)
        }
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._lock = threading.Lock()
        self._pieces: OrderedDict[MetadataIndex, Future[Tensor]] = OrderedDict()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str, region: Region | None = None) -> Tensor:
        region = whole(self.shape(name)) if region is None else region
        out = torch.empty(extent(region), dtype=self.dtype(name))
        self.read_into(name, region, out)
        return out

    def read_into(self, name: str, region: Region, out: Tensor) -> None:
        for chunk in self._tensors[name].chunks:
            held = box(chunk.offsets, chunk.sizes)
            shared = overlap(held, region) if region else ()
            if shared is None:
                continue
            part = self._piece(name, chunk)
            out[shift(shared, region)] = part[shift(shared, held)]

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A verified piece; who asks for one that another thread is reading waits for it."""
        index = MetadataIndex(name, chunk.offsets)
        with self._lock:
            wanted = self._pieces.get(index)
            if wanted is not None:
                self._pieces.move_to_end(index)
            else:
                mine: Future[Tensor] = Future()
                self._pieces[index] = mine
                self._forget()
        if wanted is not None:
            return wanted.result()
        try:
            mine.set_result(self._read_piece(name, chunk, self._places[index]))
        except BaseException as error:
            with self._lock:
                self._pieces.pop(index, None)
            mine.set_exception(error)
            raise
        return mine.result()

    def _forget(self) -> None:
        """Let go of the oldest pieces, so that all that are kept or being read are within the limit, or are one."""
        sizes = {index: self._places[index].length for index in self._pieces}
        total = sum(sizes.values())
        while len(sizes) > 1 and total > _CACHE_BYTES:
            index = next(iter(sizes))
            total -= sizes.pop(index)
            del self._pieces[index]

    def _read_piece(self, name: str, chunk: ChunkStorageMetadata, place: _StorageInfo) -> Tensor:
        path = self.folder / place.relative_path
        if place.relative_path not in self.integrity.files:
            raise CheckpointError(f"{self.folder}: {name} is said to lie in {place.relative_path!r}, no part of it.")
        self.integrity.check_piece(place.relative_path, place.offset, place.length, None, name)
        content = torch.empty(place.length, dtype=torch.uint8)
        view, digest = raw(content), hashlib.sha256()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for start in range(0, place.length, BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                read_exactly(descriptor, block, place.offset + start, path)
                digest.update(block)
        finally:
            os.close(descriptor)
        self.integrity.check_piece(place.relative_path, place.offset, place.length, digest.hexdigest(), name)
        part = elements(content, path)
        if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != self.dtype(name):
            raise CheckpointError(
                f"{path}: the part for {name} has another shape or type than promised. Do not use this checkpoint."
            )
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
