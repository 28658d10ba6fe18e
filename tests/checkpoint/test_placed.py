"""Tensors read by byte range: any slice, into memory of any layout, with no more read than rows that hold it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint.dtypes import BFLOAT16
from megatron_vita.checkpoint.lazy import extent
from megatron_vita.checkpoint.placed import PlacedTensors, TensorPlace
from megatron_vita.errors import CheckpointError

START = 6
"""Bytes of the file that belong to something else."""


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_slice_is_read_into_any_memory(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    sides = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    slices = tuple(slice(*side) for side in sides)
    content = np.arange(np.prod(shape, dtype=int), dtype=np.uint16).reshape(shape) + 257
    path = tmp_path_factory.getbasetemp() / "placed"
    path.write_bytes(b"x" * START + content.tobytes() + b"yy")
    tensors = PlacedTensors({"a": TensorPlace(path, BFLOAT16, shape, START)})
    size = extent(slices)
    backwards = (
        np.zeros(size[::-1], np.uint16).T if data.draw(st.booleans()) else np.zeros((*size, 2), np.uint16)[..., 0]
    )
    plain = np.zeros(size, np.uint16)
    for out in (plain, backwards):
        tensors.read_into("a", slices, out)
        assert np.array_equal(out, content[(*slices, ...)])


def test_only_the_rows_that_hold_a_slice_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * 6 * 10 * 2))
    tensors = PlacedTensors({"a": TensorPlace(path, BFLOAT16, (4, 6, 10), 0)})
    read, seen = os.preadv, []

    def watched(descriptor: int, views: list[memoryview], position: int) -> int:
        seen.append((position, len(views[0])))
        return read(descriptor, views, position)

    monkeypatch.setattr(os, "preadv", watched)
    tensors.bits("a", (slice(2, 3), slice(1, 3), slice(4, 5)))
    tensors.bits("a", (slice(2, 3), slice(1, 2), slice(4, 7)))
    tensors.bits("a", (slice(1, 3), slice(0, 6), slice(0, 10)))
    assert seen == [(2 * (120 + 10), 40), (2 * (120 + 10 + 4), 6), (2 * 60, 240)]


def test_a_file_that_ends_or_went_away_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(7))
    tensors = PlacedTensors({"a": TensorPlace(path, BFLOAT16, (4,), 0)})
    with pytest.raises(CheckpointError, match="file: ends at byte 7"):
        tensors.bits("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="file: cannot be read"):
        tensors.bits("a")
