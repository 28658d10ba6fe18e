"""Tensors that lie in files without gaps, read by byte range: what every format comes to once its header is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vita.checkpoint.dtypes import Bits, DType
from megatron_vita.checkpoint.lazy import LazyTensors, Slices, extent, shift, slice_of
from megatron_vita.checkpoint.streams import raw, read_exactly, reading


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor's elements lie, row-major and without gaps."""

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning."""


class PlacedTensors(LazyTensors):
    """Named tensors at known places of files."""

    def __init__(self, places: Mapping[str, TensorPlace]) -> None:
        self._places = dict(places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> DType:
        return self._places[name].dtype

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        place = self._places[name]
        start, run = _run_of(place.shape, slices)
        direct = run == slices and out.flags.c_contiguous
        target = out if direct else np.empty(extent(run), place.dtype.bits)
        with reading(place.file) as descriptor:
            read_exactly(descriptor, raw(target), place.start + start * place.dtype.itemsize, place.file)
        if not direct:
            out[...] = slice_of(target, shift(slices, run))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _run_of(shape: Sequence[int], slices: Slices) -> tuple[int, Slices]:
    """(first element, rows): the shortest contiguous run of rows of a tensor that holds a slice.

    Dimensions in which the slice is one element wide come first; of the next one it takes a range, of all others all.
    """
    axis = 0
    while axis < len(shape) - 1 and slices[axis].stop - slices[axis].start == 1:
        axis += 1
    rows = (*slices[: axis + 1], *(slice(0, size) for size in shape[axis + 1 :]))
    first = sum(one.start * math.prod(shape[index + 1 :]) for index, one in enumerate(slices[: axis + 1]))
    return first, rows
