"""Boxes: parts of a tensor along its axes, and the arithmetic on them.

A box is one slice object with explicit start and stop for each dimension, so it also indexes a tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

Slices = tuple[slice, ...]
"""A box."""
MAX_CUTS = 6
"""Dimensions along which the parts of one tensor may be cut: ranks cut two or three."""


def whole(shape: Sequence[int]) -> Slices:
    """The box that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def slices_at(offsets: Sequence[int], sizes: Sequence[int]) -> Slices:
    """The box of given sizes at given offsets."""
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def extent(slices: Slices) -> tuple[int, ...]:
    """Sizes of a box."""
    return tuple(one.stop - one.start for one in slices)


def volume(slices: Slices) -> int:
    """Elements in a box."""
    return math.prod(extent(slices))


def overlap(a: Slices, b: Slices) -> Slices | None:
    """What two boxes share, or none."""
    shared = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return shared if all(one.start < one.stop for one in shared) else None


def shift(slices: Slices, origin: Slices) -> Slices:
    """A box in the coordinates of `origin`'s first corner."""
    return tuple(slice(one.start - zero.start, one.stop - zero.start) for one, zero in zip(slices, origin, strict=True))


def move(part: Slices, source: Slices, target: Slices) -> Slices:
    """`part` of the box `source`, as the same part of the box `target`."""
    return tuple(
        slice(one.start - a.start + b.start, one.stop - a.start + b.start)
        for one, a, b in zip(part, source, target, strict=True)
    )


def runs(slices: Slices, item_size: int, limit: int) -> Iterator[Slices]:
    """A box cut along its first dimension that is not 1, into parts of about `limit` bytes and at least one row."""
    sizes = extent(slices)
    axis = next((index for index, size in enumerate(sizes) if size != 1), len(sizes))
    if axis == len(sizes):
        yield slices
        return
    rows = max(1, limit // max(1, math.prod(sizes[axis + 1 :]) * item_size))
    first = slices[axis]
    for start in range(first.start, max(first.stop, first.start + 1), rows):
        yield (*slices[:axis], slice(start, min(start + rows, first.stop)), *slices[axis + 1 :])


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Slices]:
    """The boxes that make up a run of a row-major tensor, in its order: at most 2 * dims - 1, none of them empty.

    Args:
        shape: of the tensor.
        start: first element of the run, counted through the tensor.
        stop: one past its last element.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield tuple(slice(start, stop) for _ in shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, start, stop, last)
        return
    if start < first * row:
        yield from _in_row(shape, start, first * row, first - 1)
    if first < last:
        yield (slice(first, last), *whole(shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last * row, stop, last)


def _in_row(shape: Sequence[int], start: int, stop: int, index: int) -> Iterator[Slices]:
    row = math.prod(shape[1:])
    for box in boxes_of_run(shape[1:], start - index * row, stop - index * row):
        yield (slice(index, index + 1), *box)


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
