"""Any tensors, cut into any boxes, written by any number of ranks, and read as any boxes: equal to slicing them."""

from __future__ import annotations

import dataclasses
import itertools
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint import planner as planning
from megatron_vita.checkpoint.boxes import Slices, boxes_of_run, extent, volume, whole
from megatron_vita.checkpoint.integrity import PieceDigests
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.planner import PARTS, Planner
from megatron_vita.checkpoint.reader import read
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.tensors import slice_of
from megatron_vita.checkpoint.writer import Writer
from megatron_vita.errors import CheckpointError
from tests.checkpoint.tiny import stage, state

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.float64)


def made(shape: Sequence[int], dtype: torch.dtype, chance: random.Random) -> Tensor:
    """A tensor of random bits that are numbers."""
    source = torch.Generator().manual_seed(chance.randrange(1 << 30))
    return torch.randint(-1000, 1000, tuple(shape), generator=source).to(dtype)


def cut(box: Slices, pieces: int, chance: random.Random) -> list[Slices]:
    """A box cut at random, as tensor and pipeline ranks do."""
    axes = [axis for axis, one in enumerate(box) if one.stop - one.start > 1]
    if pieces == 1 or not axes:
        return [box]
    axis = chance.choice(axes)
    at = chance.randrange(box[axis].start + 1, box[axis].stop)
    left = chance.randrange(1, pieces)
    halves = (slice(box[axis].start, at), left), (slice(at, box[axis].stop), pieces - left)
    return [one for part, count in halves for one in cut((*box[:axis], part, *box[axis + 1 :]), count, chance)]


def in_runs(shape: Sequence[int], pieces: int, chance: random.Random) -> list[Slices]:
    """A tensor cut into runs of its elements, as ranges of a distributed optimizer are."""
    size = volume(whole(shape))
    edges = sorted({0, size, *(chance.randrange(size + 1) for _ in range(pieces - 1))})
    return [box for start, stop in itertools.pairwise(edges) for box in boxes_of_run(shape, start, stop)]


def write_by_ranks(folder: Path, dealt: Sequence[Sequence[Part]]) -> Path:
    """What torch.distributed.checkpoint does over several ranks, in this process."""
    staging = folders.staging_folder(folder, 1)

    def publish(pieces: PieceDigests) -> None:
        folders.write_files(staging, state(stage()), None, pieces)
        folders.publish(folder, 1)

    planners = [Planner(parts) for parts in dealt]
    writers = [
        Writer(staging, start=lambda: folders.start_staging(folder, 1), publish=publish, durable=False) for _ in dealt
    ]
    plans = []
    for rank, (planner, writer) in enumerate(zip(planners, writers, strict=True)):
        planner.set_up_planner({PARTS: {part.label: part.data for part in dealt[rank]}}, None, rank == 0)
        writer.set_up_storage_writer(rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    together, metadata = planners[0].create_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for planner, writer, plan in zip(planners, writers, writers[0].prepare_global_plan(together), strict=True)
    ]
    writers[0].finish(metadata, results)
    return folders.step_folder(folder, 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[tuple[int, ...], torch.dtype]], int, int, int]:
    """(shape and type of each tensor, ranks, bytes of a piece, seed)."""
    shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    tensors = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4))
    return tensors, draw(st.integers(1, 6)), draw(st.sampled_from([1, 40, 1 << 20])), draw(st.integers(0, 1 << 20))


@given(cases())
@settings(max_examples=40)
@example(([((), torch.float32), ((0, 3), torch.bfloat16), ((1,), torch.int64)], 3, 1, 0))
def test_any_boxes_are_read_as_any_boxes(
    case: tuple[list[tuple[tuple[int, ...], torch.dtype]], int, int, int],
) -> None:
    described, ranks, piece_bytes, seed = case
    chance = random.Random(seed)
    tensors = {f"t{number}": made(shape, dtype, chance) for number, (shape, dtype) in enumerate(described)}
    dealt: list[list[Part]] = [[] for _ in range(ranks)]
    for name, tensor in tensors.items():
        pieces = chance.randrange(1, 8)
        shape = tuple(tensor.shape)
        boxes = in_runs(shape, pieces, chance) if chance.random() < 0.5 else cut(whole(shape), pieces, chance)
        for box in boxes or [whole(shape)]:
            dealt[chance.randrange(ranks)].append(Part(name, shape, box, slice_of(tensor, box)))
    with tempfile.TemporaryDirectory() as root, mock.patch.object(planning, "PIECE_BYTES", piece_bytes):
        folder = write_by_ranks(Path(root), dealt)
        stored = CheckpointTensors(folder)
        stored.integrity.check_all()
        assert {name: (stored.shape(name), stored.dtype(name)) for name in stored} == {
            name: (tuple(one.shape), one.dtype) for name, one in tensors.items()
        }
        _read_at_random(stored, tensors, chance)


def _read_at_random(stored: CheckpointTensors, tensors: Mapping[str, Tensor], chance: random.Random) -> None:
    asked = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        for box in [whole(shape), *(_any_box(shape, chance) for _ in range(3))]:
            assert torch.equal(stored.read(name, box), slice_of(tensor, box))
            if volume(box):
                out = torch.full((*extent(box), 2), -7).to(tensor.dtype)[..., 0]  # a view with gaps
                asked[name, tuple(one.start for one in box)] = Part(name, shape, box, out)
    before = {key: part.data.clone() for key, part in asked.items()}
    read(list(asked.values()), stored)
    for key, part in asked.items():
        assert torch.equal(part.data, slice_of(tensors[part.key], part.box)), (key, before[key])


def _any_box(shape: Sequence[int], chance: random.Random) -> Slices:
    edges = (sorted((chance.randrange(size + 1), chance.randrange(size + 1))) for size in shape)
    return tuple(slice(*pair) for pair in edges)


def test_parts_that_overlap_or_leave_a_hole_are_refused() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    rows = (slice(0, 2), slice(2, 3))
    good = [Part("a", (3, 4), (one, slice(0, 4)), tensor[one]) for one in rows]
    more = Part("a", (3, 4), (slice(0, 1), slice(0, 1)), tensor[:1, :1])
    other = dataclasses.replace(good[1], shape=(4, 4))
    for dealt in ([good, [more]], [good[:1]], [good[:1], [other]]):
        with tempfile.TemporaryDirectory() as root:
            with pytest.raises(CheckpointError, match="a: "):
                write_by_ranks(Path(root), dealt)
            assert folders.latest(Path(root)) is None
