"""Tensors that are read when asked for, whole or in part: what checkpoints and Hugging Face folders have in common.

Slices are moved as bits (dtypes.py); `read` returns values and imports torch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vita.checkpoint.dtypes import Bits, DType, as_tensor, bits_of, dtype_of

if TYPE_CHECKING:
    from torch import Tensor

Slices = tuple[slice, ...]
"""A slice of a tensor: one slice object with explicit start and stop for each dimension."""
ZEROS = "zeros"
"""Default value of elements that no stored tensor holds."""
MAX_CUTS = 6
"""Dimensions along which the parts of one tensor may be cut: ranks cut two or three."""


def whole(shape: Sequence[int]) -> Slices:
    """The slice that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def slices_at(offsets: Sequence[int], sizes: Sequence[int]) -> Slices:
    """The slice of given sizes at given offsets."""
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def extent(slices: Slices) -> tuple[int, ...]:
    """Sizes of a slice."""
    return tuple(one.stop - one.start for one in slices)


def volume(slices: Slices) -> int:
    """Elements in a slice."""
    out = 1
    for one in slices:
        out *= one.stop - one.start
    return out


def overlap(a: Slices, b: Slices) -> Slices | None:
    """What two slices share, or none."""
    shared = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return shared if all(one.start < one.stop for one in shared) else None


def fills(shards: Sequence[Slices], shape: Sequence[int]) -> bool:
    """Whether shards hold each element of a tensor exactly once, whatever they look like.

    A shard is told by its corners, each with a sign: plus where an even number of its coordinates are ends rather than
    starts. Shards fill a tensor if and only if what is left of all their corners, where they meet and cancel, are the
    corners of the tensor: their indicator functions have the same sum when these, their mixed derivatives, have. This
    takes time in proportion to the shards, where comparing each with each would let a hostile file take hours.
    Dimensions that no shard cuts do not count. Of more than MAX_CUTS dimensions that are cut, the answer is no.
    """
    cut = [
        axis for axis, size in enumerate(shape) if any((one[axis].start, one[axis].stop) != (0, size) for one in shards)
    ]
    if len(cut) > MAX_CUTS:
        return False
    left: Counter[tuple[int, ...]] = Counter()
    for weight, one in [(1, one) for one in shards] + [(-1, whole(shape))]:
        corners: list[tuple[tuple[int, ...], int]] = [((), weight)]
        for axis in cut:
            corners = [
                ((*at, place), sign * turn)
                for at, sign in corners
                for place, turn in ((one[axis].start, 1), (one[axis].stop, -1))
            ]
        for at, sign in corners:
            left[at] += sign
    return not any(left.values())


def shift(slices: Slices, origin: Slices) -> Slices:
    """A slice in the coordinates of `origin`'s first corner."""
    return tuple(slice(one.start - zero.start, one.stop - zero.start) for one, zero in zip(slices, origin, strict=True))


def move(part: Slices, source: Slices, target: Slices) -> Slices:
    """`part` of the slice `source`, as the same part of the slice `target`."""
    return tuple(
        slice(one.start - a.start + b.start, one.stop - a.start + b.start)
        for one, a, b in zip(part, source, target, strict=True)
    )


def slice_of(bits: Bits, slices: Slices) -> Bits:
    """A slice of an array as a view of it, also where the array has no dimensions."""
    index: tuple[Any, ...] = (*slices, ...)
    out: Bits = bits[index]
    return out


def runs(slices: Slices, item_size: int, limit: int) -> Iterator[Slices]:
    """A slice cut along its first dimension that is not 1, into parts of about `limit` bytes and at least one row."""
    sizes = extent(slices)
    axis = next((index for index, size in enumerate(sizes) if size != 1), len(sizes))
    if axis == len(sizes):
        yield slices
        return
    rows = max(1, limit // max(1, math.prod(sizes[axis + 1 :]) * item_size))
    first = slices[axis]
    for start in range(first.start, max(first.stop, first.start + 1), rows):
        yield (*slices[:axis], slice(start, min(start + rows, first.stop)), *slices[axis + 1 :])


@dataclass(frozen=True)
class Origin:
    """Where some elements of a tensor come from: a slice of a stored tensor, or nowhere."""

    leaf: LazyTensors | None
    """The tensors that store them; none for initialised elements."""
    name: str
    """The stored tensor's name, or what the elements are made of (ZEROS)."""
    slices: Slices | None
    elements: int


@dataclass(frozen=True)
class BorrowedView:
    """A view of a slice of a tensor, in memory that its source owns; not to be written to."""

    bits: Bits
    """Contiguous, of the slice's extent."""
    release: Callable[[], object]
    """To be called once, by any thread; the bits must not be read afterwards."""


class LazyTensors(Mapping[str, "Tensor"]):
    """Named tensors of known shape and type, whose values are read on demand and not kept."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; KeyError if there is none of that name."""

    @abstractmethod
    def dtype(self, name: str) -> DType:
        """Type of one tensor's elements, without reading it."""

    @abstractmethod
    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        """Read a slice into an array of its extent, with no copy in between where that can be. Several threads may
        read at once.

        Args:
            slices: as many slices as the tensor has dimensions.
            out: unsigned integers of the elements' size, in any layout.
        """

    def borrow(self, name: str, slices: Slices) -> BorrowedView:
        """A view of a slice, without a copy where the source holds it in memory. Several threads may borrow at once."""
        return BorrowedView(self.bits(name, slices), lambda: None)

    def bits(self, name: str, slices: Slices | None = None) -> Bits:
        """A slice (all by default) as a new array of the slice's extent."""
        slices = whole(self.shape(name)) if slices is None else slices
        out: Bits = np.empty(extent(slices), self.dtype(name).bits)
        self.read_into(name, slices, out)
        return out

    def read(self, name: str, slices: Slices | None = None) -> Tensor:
        """A slice (all by default) as a contiguous CPU tensor of the slice's extent."""
        return as_tensor(self.bits(name, slices), self.dtype(name))

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        """The stored slices that a slice consists of. What stores tensors itself is its own origin."""
        yield Origin(self, name, slices, volume(slices))

    def unused_keys(self) -> Mapping[str, str]:
        """Stored tensors that are deliberately unused, and why."""
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

    def dtype(self, name: str) -> DType:
        return dtype_of(self._tensors[name])

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        out[...] = slice_of(bits_of(self._tensors[name].detach().cpu()), slices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A mapping as LazyTensors, unchanged if it is one already."""
    return tensors if isinstance(tensors, LazyTensors) else TensorsInMemory(tensors)
