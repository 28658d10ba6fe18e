"""What a save writes: the planner of torch.distributed.checkpoint that takes boxes of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_vita.checkpoint.boxes import Slices, extent, fills, runs, shift, slices_at
from megatron_vita.checkpoint.metadata import DTYPES
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.tensors import slice_of
from megatron_vita.errors import CheckpointError

PIECE_BYTES = 8 << 20
"""Large boxes are cut along their rows into pieces of about this size."""
PARTS = "parts"
"""The one entry of the state dict: torch looks at each."""


class Planner(SavePlanner):
    """Says what is written: the given parts, in pieces. Rank 0 proves that all ranks' pieces make up each tensor."""

    def __init__(
        self,
        parts: Sequence[Part],
        source: Callable[[str, Slices], Tensor] | None = None,
        common: Mapping[str, float] | None = None,
    ) -> None:
        """Plan a save.

        Args:
            parts: what this process writes. Their data are looked up in the state dict that torch passes, by label:
                there a copy in this machine's memory may have taken their place.
            source: reads a box of a part by key instead, when its turn comes to be written.
            common: numbers of this rank's optimizer and schedule. The largest of all ranks are written: one without
                parameters has counted no step.
        """
        self._parts = parts
        self._source = source
        self._common = dict(common or {})
        self._pieces: dict[MetadataIndex, tuple[Part, Slices]] = {}
        self._state: Mapping[str, Tensor] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._state = state_dict[PARTS]

    def create_local_plan(self) -> SavePlan:
        items = []
        for part in self._parts:
            if part.data.dtype not in DTYPES.values():
                raise CheckpointError(f"{part.key}: a tensor of type {part.data.dtype} cannot be saved. Convert it.")
            for box in runs(part.box, part.data.dtype.itemsize, PIECE_BYTES):
                offsets = torch.Size(one.start for one in box)
                chunk = ChunkStorageMetadata(offsets, torch.Size(extent(box)))
                properties = TensorProperties(dtype=part.data.dtype)
                index = MetadataIndex(part.key, offsets)
                self._pieces[index] = (part, box)
                items.append(
                    WriteItem(
                        index,
                        WriteItemType.SHARD,
                        tensor_data=TensorWriteData(chunk, properties, torch.Size(part.shape)),
                    )
                )
        return SavePlan(items, planner_data=self._common)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        found: dict[str, list[TensorWriteData]] = {}
        for item in itertools.chain.from_iterable(plan.items for plan in all_plans):
            assert item.tensor_data is not None
            found.setdefault(item.index.fqn, []).append(item.tensor_data)
        for key, pieces in found.items():
            kinds = {(tuple(one.size), one.properties.dtype) for one in pieces}
            if len(kinds) > 1:
                raise CheckpointError(f"{key}: ranks disagree about its shape or type: {sorted(map(str, kinds))}.")
            boxes = [slices_at(one.chunk.offsets, one.chunk.sizes) for one in pieces]
            if len({one.chunk.offsets for one in pieces}) < len(pieces) or not fills(boxes, pieces[0].size):
                raise CheckpointError(f"{key}: its parts do not hold each element of {tuple(pieces[0].size)} once.")
        described: dict[str, Any] = {
            key: TensorStorageMetadata(pieces[0].properties, pieces[0].size, [one.chunk for one in pieces])
            for key, pieces in found.items()
        }
        common: dict[str, float] = {}
        for plan in all_plans:
            common.update({key: max(value, common.get(key, value)) for key, value in plan.planner_data.items()})
        return all_plans, Metadata(described, planner_data=common)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        part, box = self._pieces[write_item.index]
        if self._source is not None:
            return self._source(part.key, box)
        return slice_of(self._state[part.label], shift(box, part.box))
