"""Boxes: runs of row-major tensors against torch's own flattening, and whether boxes fill a tensor, judged quickly."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint.boxes import (
    MAX_CUTS,
    Slices,
    boxes_of_run,
    extent,
    fills,
    move,
    overlap,
    runs,
    shift,
    slices_at,
    volume,
    whole,
)
from tests.checkpoint.written import cut_at_random


@given(st.lists(st.integers(1, 5), min_size=0, max_size=5), st.data())
def test_boxes_of_a_run_hold_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor = torch.arange(size).reshape(shape)
    boxes = list(boxes_of_run(shape, start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(volume(one) for one in boxes)
    found = [tensor[(*one, ...)].reshape(-1) for one in boxes]
    assert torch.equal(torch.cat(found) if found else tensor.new_empty(0), torch.arange(start, stop))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(0, 300), max_size=6))
def test_runs_that_follow_each_other_fill_a_tensor(shape: list[int], cuts: list[int]) -> None:
    size = math.prod(shape)
    edges = sorted({0, size, *(cut % size for cut in cuts)})
    boxes = [box for pair in itertools.pairwise(edges) for box in boxes_of_run(shape, *pair)]
    assert fills(boxes, shape)
    assert not fills(boxes[1:], shape)
    assert not fills([*boxes, boxes[-1]], shape)


def test_no_dimensions() -> None:
    assert list(boxes_of_run((), 0, 1)) == [()]
    assert extent(()) == ()


def counted(shards: list[Slices], shape: tuple[int, ...]) -> bool:
    """The plain way: every element counted."""
    times = np.zeros(shape, np.int64)
    for one in shards:
        times[(*one, ...)] += 1
    return bool((times == 1).all())


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), seed=st.integers(0, 2**32))
def test_cuts_fill_and_any_change_is_found(shape: tuple[int, ...], seed: int) -> None:
    chance = random.Random(seed)
    shards = cut_at_random(whole(shape), chance)
    chance.shuffle(shards)
    assert fills(shards, shape)
    assert not fills(shards[1:], shape)
    assert not fills([*shards, shards[0]], shape)
    if shape:
        index, axis = chance.randrange(len(shards)), chance.randrange(len(shape))
        size = extent(shards[index])[axis]
        start = chance.randrange(shape[axis] - size + 1)
        moved = list(shards)
        moved[index] = (*shards[index][:axis], slice(start, start + size), *shards[index][axis + 1 :])
        assert fills(moved, shape) == counted(moved, shape)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_boxes_are_judged_as_counting_does(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple))
    sides = st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in shape))
    shards = [tuple(slice(*side) for side in one) for one in data.draw(st.lists(sides, max_size=6))]
    if 0 not in shape:  # what has no elements is filled by anything, but said in one way
        assert fills(shards, shape) == counted(shards, shape)


def test_equal_volumes_do_not_deceive() -> None:
    sides = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    pinwheel = [slices_at(*one) for one in sides]
    assert fills(pinwheel, (3, 3))
    shifted = [slices_at((0, 0), (2, 2)), slices_at((1, 1), (2, 2)), slices_at((2, 0), (1, 1))]
    assert sum(np.prod(extent(one)) for one in shifted) == 9
    assert not fills(shifted, (3, 3))
    assert fills([()], ())
    assert not fills([(), ()], ())
    assert not fills([], ())
    assert fills([whole((0, 3))], (0, 3))


def test_a_hostile_number_of_boxes_or_dimensions_takes_no_time() -> None:
    strips = 100_000
    columns = [slices_at((0, index), (2, 1)) for index in range(strips)]  # all meet in the first dimension
    begun = time.process_time()
    assert fills(columns, (2, strips))
    assert not fills([slices_at((index % 2,) * 64, (1,) * 64) for index in range(1000)], (2,) * 64)
    assert time.process_time() - begun < 30, "comparing each with each would take minutes"
    deep = (2,) * (MAX_CUTS + 1)
    assert not fills([slices_at(at, (1,) * len(deep)) for at in np.ndindex(deep)], deep)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1, 5), (1, 6, 3), (4, 0), (0, 4), (3, 1)])
@pytest.mark.parametrize("limit", [1, 8, 1000])
def test_runs_fill_a_slice(shape: tuple[int, ...], limit: int) -> None:
    blocks = list(runs(whole(shape), 4, limit))
    assert fills(blocks, shape)
    assert len(blocks) <= max(1, *shape, 1)


@given(st.data())
def test_what_boxes_share_is_what_indexing_shares(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
    sides = st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in shape))
    a, b = (tuple(slice(*side) for side in data.draw(sides)) for _ in range(2))
    tensor, mask = torch.arange(math.prod(shape)).reshape(shape), torch.zeros(2, *shape, dtype=torch.bool)
    mask[(0, *a)], mask[(1, *b)] = True, True
    shared, wanted = overlap(a, b), tensor[mask.all(0)]
    assert (shared is None) == (not wanted.numel())
    if shared is not None:
        assert torch.equal(tensor[(*shared, ...)].reshape(-1), wanted)
        assert torch.equal(tensor[(*a, ...)][(*shift(shared, a), ...)].reshape(-1), wanted)
        assert shift(move(shared, a, b), b) == shift(shared, a)
