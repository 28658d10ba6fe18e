"""Tensors that are read when asked for, whole or in part: what checkpoints and Hugging Face folders have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Region = tuple[slice, ...]
"""One slice with explicit start and stop for each dimension."""


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def box(offsets: Sequence[int], sizes: Sequence[int]) -> Region:
    """The region of given sizes at given offsets."""
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def extent(region: Region) -> tuple[int, ...]:
    """Sizes of a region."""
    return tuple(one.stop - one.start for one in region)


def volume(region: Region) -> int:
    """Elements in a region."""
    out = 1
    for one in region:
        out *= one.stop - one.start
    return out


def overlap(a: Region, b: Region) -> Region | None:
    """What two regions share, or none."""
    shared = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return shared if all(one.start < one.stop for one in shared) else None


def shift(region: Region, origin: Region) -> Region:
    """A region in the coordinates of `origin`'s first corner."""
    return tuple(slice(one.start - zero.start, one.stop - zero.start) for one, zero in zip(region, origin, strict=True))


def move(part: Region, source: Region, target: Region) -> Region:
    """`part` of the box `source`, as the same part of the box `target`."""
    return tuple(
        slice(one.start - a.start + b.start, one.stop - a.start + b.start)
        for one, a, b in zip(part, source, target, strict=True)
    )


def runs(region: Region, item_size: int, limit: int) -> Iterator[Region]:
    """A region cut along its first dimension that is not 1, into parts of about `limit` bytes and at least one row."""
    sizes = extent(region)
    axis = next((index for index, size in enumerate(sizes) if size != 1), len(sizes))
    if axis == len(sizes):
        yield region
        return
    rows = max(1, limit // max(1, math.prod(sizes[axis + 1 :]) * item_size))
    first = region[axis]
    for start in range(first.start, max(first.stop, first.start + 1), rows):
        yield (*region[:axis], slice(start, min(start + rows, first.stop)), *region[axis + 1 :])


@dataclass(frozen=True)
class Origin:
    """Where some elements of a tensor come from: a box of a stored tensor, or nowhere."""

    leaf: LazyTensors | None
    """Who stores them; none for elements that are made up."""
    name: str
    """The stored tensor's name, or what the elements are made of (`zeros`)."""
    region: Region | None
    elements: int


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors of known shape and dtype, whose values are read on demand and not kept."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; KeyError if there is none of that name."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor, without reading it."""

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A contiguous CPU tensor of the region's extent (all of it by default)."""

    def read_into(self, name: str, region: Region, out: Tensor) -> None:
        """Read a region into a CPU tensor of its extent and the tensor's dtype, with no copy in between where that can
        be. Several threads may read at once."""
        out.copy_(self.read(name, region))

    def origins(self, name: str, region: Region) -> Iterator[Origin]:
        """The stored boxes that a region consists of. What stores tensors itself is its own origin."""
        yield Origin(self, name, region, volume(region))

    def left_out(self) -> Mapping[str, str]:
        """Stored tensors that are on purpose not handed on, and why."""
        return {}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        # Mapping's own asks by reading the value.
        try:
            self.shape(str(name))
        except KeyError:
            return False
        return True


class TensorsInMemory(LazyTensors):
    """The same interface over an ordinary dictionary."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, region: Region | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return (tensor if region is None else tensor[region]).cpu().contiguous()

    def read_into(self, name: str, region: Region, out: Tensor) -> None:
        tensor = self._tensors[name].detach()
        out.copy_(tensor[region] if region else tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A mapping as LazyTensors, unchanged if it is one already."""
    return tensors if isinstance(tensors, LazyTensors) else TensorsInMemory(tensors)
