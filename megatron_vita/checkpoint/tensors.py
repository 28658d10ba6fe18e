"""Tensors that are read when asked for, whole or in part: what checkpoints and Hugging Face folders have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, extent, volume, whole

ZEROS = "zeros"
"""Default value of elements that no stored tensor holds."""


def slice_of(tensor: Tensor, slices: Slices) -> Tensor:
    """A box of a tensor as a view of it, also where the tensor has no dimensions."""
    return tensor[slices] if slices else tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous CPU tensor, uint8 `[bytes]`, not copied."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    return flat.view(torch.uint8)


@dataclass(frozen=True)
class Origin:
    """Where some elements of a tensor come from: a slice of a stored tensor, or nowhere."""

    leaf: LazyTensors | None
    """The tensors that store them; none for initialised elements."""
    name: str
    """The stored tensor's name, or what the elements are made of (ZEROS)."""
    slices: Slices | None
    elements: int


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors of known shape and type, whose values are read on demand and not kept."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; KeyError if there is none of that name."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor's elements, without reading it."""

    @abstractmethod
    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        """Read a slice into a CPU tensor of its extent and the tensor's own type, in any layout (a view of another
        tensor, for instance), with no copy in between where that can be. Several threads may read at once.

        Args:
            slices: as many slices as the tensor has dimensions.
        """

    def read(self, name: str, slices: Slices | None = None) -> Tensor:
        """A slice (all by default) as a new, contiguous CPU tensor of the slice's extent."""
        slices = whole(self.shape(name)) if slices is None else slices
        out = torch.empty(extent(slices), dtype=self.dtype(name))
        self.read_into(name, slices, out)
        return out

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor's elements."""
        return volume(whole(self.shape(name))) * self.dtype(name).itemsize

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

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        out.copy_(slice_of(self._tensors[name].detach(), slices))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def as_lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A mapping as LazyTensors, unchanged if it is one already."""
    return tensors if isinstance(tensors, LazyTensors) else TensorsInMemory(tensors)
