"""Tensors that are read when asked for, whole or in part: what checkpoints and Hugging Face folders have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

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

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)


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

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A mapping as LazyTensors, unchanged if it is one already."""
    return tensors if isinstance(tensors, LazyTensors) else TensorsInMemory(tensors)
