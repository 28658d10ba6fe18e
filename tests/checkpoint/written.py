"""Checkpoints of any parts, written by one process in the place of several ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, extent, whole
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.writer import PARTS, Planner, Writer


class Evil:
    """What a pickle may do if one lets it: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def all_of(key: str, data: Tensor) -> Part:
    """A whole tensor as a part."""
    return Part(key, tuple(data.shape), whole(data.shape), data)


def write_parts(folder: Path, ranks: Sequence[Sequence[Part]], *, finite: bool = False) -> CheckpointTensors:
    """Write what each rank holds.

    Args:
        folder: where to; made.
        ranks: the parts of each.
    """
    writer = Writer(folder, folder.mkdir, lambda pieces: write_integrity(folder, pieces), durable=False, finite=finite)
    planners = [Planner(parts) for parts in ranks]
    plans = writer.prepare_global_plan([one.create_local_plan() for one in planners])
    plans, metadata = planners[0].create_global_plan(plans)
    writer.set_up_storage_writer(True)
    results = []
    for plan, planner, parts in zip(plans, planners, ranks, strict=True):
        planner.set_up_planner({PARTS: {part.label: part.data for part in parts}})
        results.append(writer.write_data(plan, planner).wait())
    writer.finish(metadata, results)
    return CheckpointTensors(folder)


def cut_at_random(slices: Slices, chance: random.Random) -> list[Slices]:
    """A slice in shards, each cut again along any dimension: staggered, so that no one dimension orders them."""
    axes = [axis for axis, size in enumerate(extent(slices)) if size > 1]
    if not axes or chance.random() < 0.2:
        return [slices]
    axis = chance.choice(axes)
    at = chance.randrange(slices[axis].start + 1, slices[axis].stop)
    halves = (slice(slices[axis].start, at), slice(at, slices[axis].stop))
    return [one for half in halves for one in cut_at_random((*slices[:axis], half, *slices[axis + 1 :]), chance)]
