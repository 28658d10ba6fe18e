"""Tensors that are read when asked for, whole or in part: what checkpoints and Hugging Face folders have in common.

Regions are moved as bits (dtypes.py); who wants values calls `read`, which imports torch.
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

Region = tuple[slice, ...]
"""One slice with explicit start and stop for each dimension."""
ZEROS = "zeros"
"""What elements are made of that come from nowhere, unless it is something else."""
MAX_CUTS = 6
"""Dimensions along which the parts of one tensor may be cut: ranks cut two or three."""


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


def fills(boxes: Sequence[Region], shape: Sequence[int]) -> bool:
    """Whether boxes hold each element of a tensor exactly once, whatever they look like.

    A box is told by its corners, each with a sign: plus where an even number of its coordinates are ends rather than
    starts. Boxes fill a tensor if and only if what is left of all their corners, where they meet and cancel, are the
    corners of the tensor: their indicator functions have the same sum when these, their mixed derivatives, have. This
    takes time in proportion to the boxes, where comparing each with each would let a hostile file take hours.
    Dimensions that no box cuts do not count. Of more than MAX_CUTS dimensions that are cut, the answer is no.
    """
    cut = [
        axis for axis, size in enumerate(shape) if any((one[axis].start, one[axis].stop) != (0, size) for one in boxes)
    ]
    if len(cut) > MAX_CUTS:
        return False
    left: Counter[tuple[int, ...]] = Counter()
    for weight, one in [(1, one) for one in boxes] + [(-1, whole(shape))]:
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


def shift(region: Region, origin: Region) -> Region:
    """A region in the coordinates of `origin`'s first corner."""
    return tuple(slice(one.start - zero.start, one.stop - zero.start) for one, zero in zip(region, origin, strict=True))


def move(part: Region, source: Region, target: Region) -> Region:
    """`part` of the box `source`, as the same part of the box `target`."""
    return tuple(
        slice(one.start - a.start + b.start, one.stop - a.start + b.start)
        for one, a, b in zip(part, source, target, strict=True)
    )


def part(bits: Bits, region: Region) -> Bits:
    """A region of an array as a view of it, also where the array has no dimensions."""
    index: tuple[Any, ...] = (*region, ...)
    out: Bits = bits[index]
    return out


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
    """The stored tensor's name, or what the elements are made of (ZEROS)."""
    region: Region | None
    elements: int


@dataclass(frozen=True)
class BorrowedView:
    """A region of a tensor in somebody else's memory, to be looked at and given back."""

    bits: Bits
    """Contiguous, of the region's extent."""
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
    def read_into(self, name: str, region: Region, out: Bits) -> None:
        """Read a region into an array of its extent, with no copy in between where that can be. Several threads may
        read at once.

        Args:
            region: as many slices as the tensor has dimensions.
            out: unsigned integers of the elements' size, in any layout.
        """

    def borrow(self, name: str, region: Region) -> BorrowedView:
        """A region to look at, not copied where it lies in memory already. Several threads may borrow at once."""
        return BorrowedView(self.bits(name, region), lambda: None)

    def bits(self, name: str, region: Region | None = None) -> Bits:
        """A region (all by default) as a new array of the region's extent."""
        region = whole(self.shape(name)) if region is None else region
        out: Bits = np.empty(extent(region), self.dtype(name).bits)
        self.read_into(name, region, out)
        return out

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A region (all by default) as a contiguous CPU tensor of the region's extent."""
        return as_tensor(self.bits(name, region), self.dtype(name))

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

    def dtype(self, name: str) -> DType:
        return dtype_of(self._tensors[name])

    def read_into(self, name: str, region: Region, out: Bits) -> None:
        out[...] = part(bits_of(self._tensors[name].detach().cpu()), region)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A mapping as LazyTensors, unchanged if it is one already."""
    return tensors if isinstance(tensors, LazyTensors) else TensorsInMemory(tensors)
