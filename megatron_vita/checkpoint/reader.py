"""Reading a checkpoint through torch.distributed.checkpoint: our planner and our storage reader.

A rank reads the stored pieces that overlap its parts, each once and verified, in any layout and without a plan of all.
Nothing of the files is ever unpickled.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from megatron_vita import device
from megatron_vita.checkpoint.boxes import extent, slices_at, volume
from megatron_vita.checkpoint.metadata import StoredPiece
from megatron_vita.checkpoint.parts import Part, as_checkpoint_errors
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.streams import Workers
from megatron_vita.checkpoint.tensors import slice_of


class Reader(FileSystemReader):
    """Reads pieces of a checkpoint, each once and verified, into the parts that overlap them."""

    def __init__(self, tensors: CheckpointTensors, workers: int = 2) -> None:
        super().__init__(tensors.folder)
        self._tensors = tensors
        self._workers = workers
        self.bytes_read = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[str, int]] = {}
        for key, one in self._tensors.stored.items():
            chunks: list[ChunkStorageMetadata] = []
            for number, piece in enumerate(one.pieces):
                offsets = torch.Size(axis.start for axis in piece.box)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(extent(piece.box))))
                places[MetadataIndex(key, offsets)] = (key, number)
            described[key] = TensorStorageMetadata(TensorProperties(one.dtype), torch.Size(one.shape), chunks)
        return Metadata(described, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(self.storage_data[item.storage_index], []).append(item)
        kept = threading.local()

        def read(one: tuple[tuple[str, int], list[ReadItem]]) -> int:
            (key, number), items = one
            piece, dtype = self._tensors.stored[key].pieces[number], self._tensors.dtype(key)
            targets = [planner.resolve_tensor(item) for item in items]
            if len(targets) == 1 and _takes_whole(targets[0], piece, dtype):
                self._tensors.read_piece(key, piece, targets[0])
                return piece.length
            if getattr(kept, "memory", None) is None or kept.memory.nbytes < piece.length:
                kept.memory = torch.empty(piece.length, dtype=torch.uint8)
            size = volume(piece.box) * dtype.itemsize
            content = self._tensors.read_piece(key, piece, kept.memory[:size].view(dtype).view(extent(piece.box)))
            for item, target in zip(items, targets, strict=True):
                target.copy_(slice_of(content, slices_at(item.storage_offsets, item.lengths)))
            return piece.length

        in_file_order = sorted(wanted.items(), key=lambda one: self._position(*one[0]))
        with torch.no_grad(), Workers(self._workers) as pool:
            self.bytes_read += sum(pool.map(read, in_file_order))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _position(self, key: str, number: int) -> tuple[str, int]:
        piece = self._tensors.stored[key].pieces[number]
        return piece.file, piece.position


def _takes_whole(target: Tensor, piece: StoredPiece, dtype: torch.dtype) -> bool:
    """Whether a piece can be read right into its place."""
    whole = tuple(target.shape) == extent(piece.box) and target.dtype == dtype
    return whole and target.is_contiguous() and device.is_host_memory(target)


class PartsPlanner(LoadPlanner):
    """Says what is read: the given parts, by their overlaps with stored pieces."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = {(part.key, tuple(one.start for one in part.box)): part for part in parts}
        assert len(self._parts) == len(parts), "two parts of this rank begin at one element"
        self._metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for part in self._parts.values():
            offsets, sizes = torch.Size(one.start for one in part.box), torch.Size(extent(part.box))
            chunks.setdefault(part.key, []).append(ChunkStorageMetadata(offsets, sizes))
        items: list[ReadItem] = []
        for key, wanted in chunks.items():
            stored = self._metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, wanted)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are stored")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.offset is not None
        part = self._parts[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        return slice_of(part.data.detach(), slices_at(read_item.dest_offsets, read_item.lengths))

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: it was read in place."""


def read(parts: Sequence[Part], tensors: CheckpointTensors) -> int:
    """Read parts in place. Each rank reads by itself, without a plan of all.

    Returns:
        Bytes of files that were read.

    Raises:
        DamagedError: a piece is not what was written.
    """
    reader = Reader(tensors)
    with as_checkpoint_errors():
        load({}, storage_reader=reader, planner=PartsPlanner(parts), no_dist=True)
    return reader.bytes_read
