"""Compare the tensors of two models, in any two formats. (Running both: logits.py.)

Equal bits are equal values, so two equal models are compared as fast as they are read. Only where bits differ are
values computed, in float64 and without torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vita.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Bits, DType
from megatron_vita.checkpoint.lazy import LazyTensors, Slices, runs, volume, whole
from megatron_vita.checkpoint.streams import BLOCK_BYTES, Workers, byte_bar, default_workers

_RUN_BYTES = 16 << 20
"""Bytes that a thread compares at once: one shard of a checkpoint, which is read whole."""
_INFINITY = {FLOAT64: 0x7FF << 52, FLOAT32: 0xFF << 23, FLOAT16: 0x1F << 10, BFLOAT16: 0xFF << 7}
"""Bits of infinity; those of NaN are larger, for either sign."""


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor between two models."""

    name: str
    max_difference: float
    """Largest absolute difference; infinite where one model lacks the tensor or the shapes differ; NaN where either
    tensor holds a NaN, also where both have the same bits: such a model equals no model."""
    cosine: float
    note: str = ""
    """Differences that the numbers do not show: of types or shapes."""

    @property
    def equal(self) -> bool:
        """Bit for bit the same values."""
        return self.max_difference == 0.0 and not self.note


@dataclass(frozen=True)
class _Sums:
    """Sums of the comparison of some elements of a tensor."""

    same: bool = True
    """Whether all bits are equal. If so, only `worst` was computed."""
    worst: float = 0.0
    dot: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.same and other.same,
            _worse(self.worst, other.worst),
            self.dot + other.dot,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
        )


def compare_tensors(
    first: LazyTensors, second: LazyTensors, *, workers: int | None = None, progress: bool = False
) -> Iterator[Difference]:
    """Compare every tensor of two models, by checkpoint key, in the first one's order; then those only in the second.

    Args:
        workers: threads, by default one more than there are cores.
        progress: show a bar on standard error.

    Raises:
        CheckpointError: one of the models is damaged.
    """
    common = [name for name in first if name in second and first.shape(name) == second.shape(name)]
    total = sum(math.prod(first.shape(name)) * first.dtype(name).itemsize for name in common)

    def compare(item: tuple[str, Slices]) -> tuple[str, Slices, _Sums]:
        return (*item, _compare(first, second, *item))

    with Workers(workers or default_workers()) as pool, byte_bar(total, show=progress) as bar:
        items = ((name, slices) for name in common for slices in _blocks(first, name))
        compared = itertools.groupby(pool.map(compare, items), key=lambda one: one[0])
        for name in [*first, *(name for name in second if name not in first)]:
            if name not in second or name not in first:
                where = "first" if name in first else "second"
                yield Difference(name, math.inf, 0.0, f"only in the {where} model")
            elif first.shape(name) != second.shape(name):
                yield Difference(name, math.inf, 0.0, f"shapes {first.shape(name)} and {second.shape(name)}")
            else:
                sums, same = _Sums(), []
                for _, slices, one in next(compared)[1]:
                    sums += one
                    if one.same:
                        same.append(slices)
                    bar.update(volume(slices) * first.dtype(name).itemsize)
                if not sums.same:  # equal elements count for the cosine, too
                    sums = sum(pool.map(functools.partial(_squares, first, name), same), sums)
                yield _difference(name, sums, first.dtype(name), second.dtype(name))


def _blocks(tensors: LazyTensors, name: str) -> Iterator[Slices]:
    return runs(whole(tensors.shape(name)), tensors.dtype(name).itemsize, _RUN_BYTES)


def _difference(name: str, sums: _Sums, kind_a: DType, kind_b: DType) -> Difference:
    note = ""
    if kind_a != kind_b:
        note = f"types {kind_a} and {kind_b}"
    elif sums.worst == 0.0 and not sums.same:
        note = "zeros of other signs"
    if sums.same:
        return Difference(name, sums.worst, 1.0 if sums.worst == 0.0 else math.nan, note)
    norm = math.sqrt(sums.square_a) * math.sqrt(sums.square_b)
    return Difference(name, sums.worst, sums.dot / norm if norm else float(sums.square_a == sums.square_b), note)


def _compare(first: LazyTensors, second: LazyTensors, name: str, slices: Slices) -> _Sums:
    """One slice, block by block."""
    kinds = first.dtype(name), second.dtype(name)
    sums, same = _Sums(), []
    for block in runs(slices, kinds[0].itemsize, BLOCK_BYTES):
        a, b = first.borrow(name, block), second.borrow(name, block)
        try:
            if kinds[0] == kinds[1] and _same(a.bits, b.bits):
                sums += _Sums(worst=math.nan if _holds_nan(a.bits, kinds[0]) else 0.0)
                same.append(block)
            else:
                sums += _computed(_values(a.bits, kinds[0]), _values(b.bits, kinds[1]))
        finally:
            a.release()
            b.release()
    return sums if sums.same else sum((_squares(first, name, block) for block in same), sums)


def _squares(tensors: LazyTensors, name: str, slices: Slices) -> _Sums:
    """Sums over elements that are equal in both models."""
    total = 0.0
    for block in runs(slices, tensors.dtype(name).itemsize, BLOCK_BYTES):
        view = tensors.borrow(name, block)
        try:
            values = _values(view.bits, tensors.dtype(name))
            total += float(np.square(values, out=values).sum())
        finally:
            view.release()
    return _Sums(True, 0.0, total, total, total)


def _same(a: Bits, b: Bits) -> bool:
    """Whether all bits are equal. Comparing eight bytes at once keeps the array of results small."""
    if a.nbytes % 8 == 0:
        a, b = (one.reshape(-1).view(np.uint64) for one in (a, b))
    return np.array_equal(a, b)


def _computed(a: NDArray[np.float64], b: NDArray[np.float64]) -> _Sums:
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a - b)
        gap[a == b] = 0.0  # two infinities
        return _Sums(
            False, float(gap.max(initial=0.0)), float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
        )


def _values(bits: Bits, dtype: DType) -> NDArray[np.float64]:
    """One-dimensional, also of a tensor without dimensions."""
    bits = bits.reshape(-1)
    if dtype == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(dtype.name).astype(np.float64)


def _holds_nan(bits: Bits, dtype: DType) -> bool:
    """Whether an element is NaN. Two maxima need no second array, as a mask of exponents would."""
    infinity = _INFINITY.get(dtype)
    if infinity is None or not bits.size:
        return False
    sign = 1 << (8 * dtype.itemsize - 1)
    return bool(bits.view(f"i{dtype.itemsize}").max() > infinity or bits.max() > infinity | sign)


def _worse(a: float, b: float) -> float:
    """The larger of two; NaN is the largest."""
    return a if math.isnan(a) else b if math.isnan(b) else max(a, b)
