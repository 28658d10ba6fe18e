"""Views of sources: several as one, a subset of one, and one with additional rows. Nothing is copied until read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_vita.checkpoint.dtypes import Bits, DType, as_tensor
from megatron_vita.checkpoint.lazy import (
    ZEROS,
    BorrowedView,
    LazyTensors,
    Origin,
    Slices,
    extent,
    overlap,
    runs,
    shift,
    slice_of,
    volume,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 32 << 20
"""Size of a block that is read to compute a mean."""


class Subset(LazyTensors):
    """A subset of another source's tensors."""

    def __init__(self, source: LazyTensors, names: Sequence[str], why: str = "not part of this model") -> None:
        """Args: why: the reason why the others are unused, for the report."""
        self._source = source
        self._names = dict.fromkeys(names)
        self._why = why

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> DType:
        return self._source.dtype(name)

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        self._source.read_into(name, slices, out)

    def borrow(self, name: str, slices: Slices) -> BorrowedView:
        return self._source.borrow(name, slices)

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        return self._source.origins(name, slices)

    def unused_keys(self) -> Mapping[str, str]:
        """The stored tensors of every name outside the subset."""
        others = [name for name in self._source if name not in self._names]
        stored = {
            origin.name: self._why
            for name in others
            for origin in self._source.origins(name, whole(self._source.shape(name)))
            if origin.leaf is not None
        }
        return {**stored, **self._source.unused_keys()}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyTensors):
    """Several sources as one; no name may stand in two of them."""

    def __init__(self, sources: Sequence[LazyTensors]) -> None:
        self._sources = sources
        self._home: dict[str, LazyTensors] = {}
        for source in sources:
            for name in source:
                assert name not in self._home, f"{name} comes from two sources"
                self._home[name] = source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].shape(name)

    def dtype(self, name: str) -> DType:
        return self._home[name].dtype(name)

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        self._home[name].read_into(name, slices, out)

    def borrow(self, name: str, slices: Slices) -> BorrowedView:
        return self._home[name].borrow(name, slices)

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        return self._home[name].origins(name, slices)

    def unused_keys(self) -> Mapping[str, str]:
        return {name: why for source in self._sources for name, why in source.unused_keys().items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


class MoreRows(LazyTensors):
    """A source with additional rows in some tensors; the new rows are the mean of the old ones, or zeros."""

    def __init__(self, source: LazyTensors, names: Sequence[str], rows: int, *, mean: bool) -> None:
        """Args: names: tensors [old rows, width] that grow to [rows, width], where the source has them."""
        self._source = source
        self._rows = rows
        self._new = {name: _mean_row(source, name) if mean else None for name in names if name in source}

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (self._rows, *shape[1:]) if name in self._new else shape

    def dtype(self, name: str) -> DType:
        return self._source.dtype(name)

    def read_into(self, name: str, slices: Slices, out: Bits) -> None:
        old = overlap(whole(self._source.shape(name)), slices) if name in self._new else slices
        if old is not None:
            self._source.read_into(name, old, slice_of(out, shift(old, slices)))
        if name in self._new and old != slices:
            mean = self._new[name]
            rest = out[extent(old)[0] if old else 0 :]
            if mean is None:
                rest[...] = 0
            else:
                as_tensor(rest, self.dtype(name)).copy_(mean[slices[1]])

    def borrow(self, name: str, slices: Slices) -> BorrowedView:
        if name in self._new and overlap(whole(self._source.shape(name)), slices) != slices:
            return super().borrow(name, slices)
        return self._source.borrow(name, slices)

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        old = overlap(whole(self._source.shape(name)), slices) if name in self._new else slices
        if old is not None:
            yield from self._source.origins(name, old)
        if name in self._new and old != slices:
            made_of = ZEROS if self._new[name] is None else "mean of the other rows"
            yield Origin(None, made_of, None, volume(slices) - (volume(old) if old else 0))

    def unused_keys(self) -> Mapping[str, str]:
        return self._source.unused_keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def _mean_row(source: LazyTensors, name: str) -> Tensor:
    """The mean of all rows, float32, without the whole tensor in memory."""
    import torch

    total = torch.zeros(source.shape(name)[1:], dtype=torch.float64)
    for slices in runs(whole(source.shape(name)), source.dtype(name).itemsize, _BLOCK_BYTES):
        total += source.read(name, slices).sum(0, dtype=torch.float64)
    return (total / source.shape(name)[0]).float()
