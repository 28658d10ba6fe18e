"""Runs of row-major tensors as boxes, against torch's own flattening."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.checkpoint.boxes import boxes_of_run, extent, fills, volume


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
