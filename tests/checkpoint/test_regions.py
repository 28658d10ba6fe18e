"""Boxes of tensors: whether they fill one exactly is decided without comparing each with each, and rightly."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint.lazy import MAX_CUTS, Region, box, extent, fills, runs, whole


def counted(boxes: list[Region], shape: tuple[int, ...]) -> bool:
    """The plain way: every element counted."""
    times = np.zeros(shape, np.int64)
    for one in boxes:
        times[(*one, ...)] += 1
    return bool((times == 1).all())


def cut_at_random(region: Region, chance: random.Random) -> list[Region]:
    """A region in boxes, each cut again along any dimension: staggered, so that no one dimension orders them."""
    axes = [axis for axis, size in enumerate(extent(region)) if size > 1]
    if not axes or chance.random() < 0.2:
        return [region]
    axis = chance.choice(axes)
    at = chance.randrange(region[axis].start + 1, region[axis].stop)
    halves = (slice(region[axis].start, at), slice(at, region[axis].stop))
    return [one for half in halves for one in cut_at_random((*region[:axis], half, *region[axis + 1 :]), chance)]


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), seed=st.integers(0, 2**32))
def test_cuts_fill_and_any_change_is_found(shape: tuple[int, ...], seed: int) -> None:
    chance = random.Random(seed)
    boxes = cut_at_random(whole(shape), chance)
    chance.shuffle(boxes)
    assert fills(boxes, shape)
    assert not fills(boxes[1:], shape)
    assert not fills([*boxes, boxes[0]], shape)
    if shape:
        index, axis = chance.randrange(len(boxes)), chance.randrange(len(shape))
        size = extent(boxes[index])[axis]
        start = chance.randrange(shape[axis] - size + 1)
        moved = list(boxes)
        moved[index] = (*boxes[index][:axis], slice(start, start + size), *boxes[index][axis + 1 :])
        assert fills(moved, shape) == counted(moved, shape)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_boxes_are_judged_as_counting_does(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple))
    sides = st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in shape))
    boxes = [tuple(slice(*side) for side in one) for one in data.draw(st.lists(sides, max_size=6))]
    if 0 not in shape:  # what has no elements is filled by anything, but said in one way
        assert fills(boxes, shape) == counted(boxes, shape)


def test_equal_volumes_do_not_deceive() -> None:
    sides = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    pinwheel = [box(*one) for one in sides]
    assert fills(pinwheel, (3, 3))
    shifted = [box((0, 0), (2, 2)), box((1, 1), (2, 2)), box((2, 0), (1, 1))]
    assert sum(np.prod(extent(one)) for one in shifted) == 9
    assert not fills(shifted, (3, 3))
    assert fills([()], ())
    assert not fills([(), ()], ())
    assert not fills([], ())
    assert fills([whole((0, 3))], (0, 3))


def test_a_hostile_number_of_boxes_or_dimensions_takes_no_time() -> None:
    strips = 100_000
    columns = [box((0, index), (2, 1)) for index in range(strips)]  # all meet in the first dimension
    begun = time.process_time()
    assert fills(columns, (2, strips))
    assert not fills([box((index % 2,) * 64, (1,) * 64) for index in range(1000)], (2,) * 64)
    assert time.process_time() - begun < 30, "comparing each with each would take minutes"
    deep = (2,) * (MAX_CUTS + 1)
    assert not fills([box(at, (1,) * len(deep)) for at in np.ndindex(deep)], deep)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1, 5), (1, 6, 3), (4, 0), (0, 4), (3, 1)])
@pytest.mark.parametrize("limit", [1, 8, 1000])
def test_runs_fill_a_region(shape: tuple[int, ...], limit: int) -> None:
    regions = list(runs(whole(shape), 4, limit))
    assert fills(regions, shape)
    assert len(regions) <= max(1, *shape, 1)
