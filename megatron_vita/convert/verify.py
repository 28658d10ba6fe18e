"""Compare the tensors of two models, in any two formats. (Running both: logits.py.)

Equal bits are equal values, so two equal models are compared as fast as they are read. Only where bits differ are
values computed, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, runs, volume, whole
from megatron_vita.checkpoint.streams import Workers, byte_bar, default_workers
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.convert.values import same_bits, type_name

_BLOCK_BYTES = 16 << 20
"""Bytes that a thread compares at once: one piece of a checkpoint, which is read whole."""
_ELEMENTS = 1 << 20
"""Elements whose values a thread computes at once."""


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
            max(self.worst, other.worst, key=lambda one: (one != one, one)),  # NaN is the largest
            self.dot + other.dot,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
        )


def compare_tensors(
    first: LazyTensors, second: LazyTensors, *, workers: int | None = None, progress: bool = False
) -> Iterator[Difference]:
    """Compare every tensor of two models, by checkpoint key, in the first one's order; then those only in the second.
    Raises CheckpointError: one of the models is damaged.

    Args:
        workers: threads, by default one more than there are cores.
        progress: show a bar on standard error.
    """
    common = [name for name in first if name in second and first.shape(name) == second.shape(name)]

    def compare(item: tuple[str, Slices]) -> tuple[str, Slices, _Sums]:
        return (*item, _compare(first.read(*item), second.read(*item)))

    def squares(item: tuple[str, Slices]) -> _Sums:
        return _squares(first.read(*item))

    with Workers(workers or default_workers()) as pool, byte_bar(sum(map(first.nbytes, common)), show=progress) as bar:
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
                    sums = sum(pool.map(squares, [(name, slices) for slices in same]), sums)
                yield _difference(name, sums, first.dtype(name), second.dtype(name))


def _blocks(tensors: LazyTensors, name: str) -> Iterator[Slices]:
    return runs(whole(tensors.shape(name)), tensors.dtype(name).itemsize, _BLOCK_BYTES)


def _difference(name: str, sums: _Sums, kind_a: torch.dtype, kind_b: torch.dtype) -> Difference:
    note = ""
    if kind_a != kind_b:
        note = f"types {type_name(kind_a)} and {type_name(kind_b)}"
    elif sums.worst == 0.0 and not sums.same:
        note = "zeros of other signs"
    if sums.same:
        return Difference(name, sums.worst, 1.0 if sums.worst == 0.0 else math.nan, note)
    norm = math.sqrt(sums.square_a) * math.sqrt(sums.square_b)
    return Difference(name, sums.worst, sums.dot / norm if norm else float(sums.square_a == sums.square_b), note)


def _compare(a: Tensor, b: Tensor) -> _Sums:
    if same_bits(a, b):
        return _Sums(worst=math.nan if a.isnan().any() else 0.0)
    sums = _Sums()
    for x, y in zip(*(one.reshape(-1).split(_ELEMENTS) for one in (a, b)), strict=True):
        sums += _computed(x.double(), y.double())
    return sums


def _computed(a: Tensor, b: Tensor) -> _Sums:
    gap = (a - b).abs_()
    gap[a == b] = 0.0  # two infinities
    worst = gap.max().item() if gap.numel() else 0.0  # NaN, if one is
    return _Sums(False, worst, (a * b).sum().item(), (a * a).sum().item(), (b * b).sum().item())


def _squares(values: Tensor) -> _Sums:
    """Sums over elements that are equal in both models."""
    total = sum(one.double().square().sum().item() for one in values.reshape(-1).split(_ELEMENTS))
    return _Sums(True, 0.0, total, total, total)
