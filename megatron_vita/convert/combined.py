"""Views of sources: several as one, a subset of one, and one with additional rows. Nothing is copied until read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, extent, overlap, runs, shift, volume, whole
from megatron_vita.checkpoint.tensors import ZEROS, LazyTensors, Origin, slice_of

_BLOCK_BYTES = 32 << 20
"""Size of a block that is read to compute a mean."""


class _Delegated(LazyTensors):
    """Tensors that other sources hold, under the same names."""

    def __init__(self, homes: Mapping[str, LazyTensors]) -> None:
        self._homes = homes
        """Name -> the source that holds it."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self._homes[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._homes[name].dtype(name)

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        self._homes[name].read_into(name, slices, out)

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        return self._homes[name].origins(name, slices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class Subset(_Delegated):
    """A subset of another source's tensors."""

    def __init__(self, source: LazyTensors, names: Sequence[str], why: str = "not part of this model") -> None:
        """Args: why: the reason why the others are unused, for the report."""
        super().__init__(dict.fromkeys(names, source))
        self._source = source
        self._why = why

    def unused_keys(self) -> Mapping[str, str]:
        """The stored tensors of every name outside the subset."""
        others = [name for name in self._source if name not in self._homes]
        stored = {
            origin.name: self._why
            for name in others
            for origin in self._source.origins(name, whole(self._source.shape(name)))
            if origin.leaf is not None
        }
        return {**stored, **self._source.unused_keys()}


class Joined(_Delegated):
    """Several sources as one; no name may stand in two of them."""

    def __init__(self, sources: Sequence[LazyTensors]) -> None:
        super().__init__({name: source for source in sources for name in source})
        assert len(self) == sum(map(len, sources)), "a name comes from two sources"
        self._sources = sources

    def unused_keys(self) -> Mapping[str, str]:
        return {name: why for source in self._sources for name, why in source.unused_keys().items()}


class MoreRows(_Delegated):
    """A source with additional rows in some tensors; the new rows are the mean of the old ones, or zeros."""

    def __init__(self, source: LazyTensors, names: Sequence[str], rows: int, *, mean: bool) -> None:
        """Args: names: tensors [old rows, width] that grow to [rows, width], where the source has them."""
        super().__init__(dict.fromkeys(source, source))
        self._source = source
        self._rows = rows
        self._new = {name: _mean_row(source, name) if mean else None for name in names if name in source}

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (self._rows, *shape[1:]) if name in self._new else shape

    def _old(self, name: str, slices: Slices) -> Slices | None:
        return overlap(whole(self._source.shape(name)), slices) if name in self._new else slices

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        old = self._old(name, slices)
        if old is not None:
            self._source.read_into(name, old, slice_of(out, shift(old, slices)))
        if old != slices:
            mean, rest = self._new[name], out[extent(old)[0] if old else 0 :]
            rest.copy_(torch.zeros(()) if mean is None else mean[slices[1]])

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        old = self._old(name, slices)
        if old is not None:
            yield from self._source.origins(name, old)
        if old != slices:
            made_of = ZEROS if self._new[name] is None else "mean of the other rows"
            yield Origin(None, made_of, None, volume(slices) - (volume(old) if old else 0))

    def unused_keys(self) -> Mapping[str, str]:
        return self._source.unused_keys()


def _mean_row(source: LazyTensors, name: str) -> Tensor:
    """The mean of all rows, float32, without the whole tensor in memory."""
    total = torch.zeros(source.shape(name)[1:], dtype=torch.float64)
    for slices in runs(whole(source.shape(name)), source.dtype(name).itemsize, _BLOCK_BYTES):
        total += source.read(name, slices).sum(0, dtype=torch.float64)
    return (total / source.shape(name)[0]).float()
