"""Index tables of a packed sequence: built on the host, laid out in one buffer, moved to the device by one copy.

A copy of ordinary host memory to a GPU makes the host wait for all kernels launched before it; one of page-locked
memory does not. A table is a dataclass, tuple, list or dict of tables and tensors; whatever else is in it stays as it
is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megatron_vita.device import page_locked

T = TypeVar("T")

_ALIGNMENT = 16
"""Bytes: the most that a GPU loads at once, and a multiple of the size of every dtype."""


@dataclass(frozen=True, slots=True)
class HostTables(Generic[T]):
    """Tables whose tensors are views of one buffer of page-locked host memory."""

    tables: T
    buffer: Tensor
    """uint8 [bytes]."""

    def to(self, device: torch.device) -> T:
        """The tables on a device, as views of one copy of the buffer; without a wait on a GPU. No copy on the CPU."""
        buffer = self.buffer.to(device, non_blocking=True)
        return map_tensors(
            self.tables, lambda one: _view(buffer, int(one.storage_offset()) * one.itemsize, one.shape, one.dtype)
        )


@dataclass(frozen=True, slots=True)
class TokenIndex:
    """Tokens selected along dimension 0 of a tensor: a contiguous range (a view) or an index list (a copy)."""

    start: int
    count: int
    index: Tensor | None = None
    """int64 [count]; None: the range [start, start + count)."""

    def gather(self, source: Tensor) -> Tensor:
        """[tokens, ...] -> [count, ...]: a view for a contiguous range, else a copy."""
        if self.index is None:
            return source.narrow(0, self.start, self.count)
        return source.index_select(0, self.index)

    def scatter_(self, target: Tensor, values: Tensor) -> None:
        """target[selected] = values, in place; values [count, ...]."""
        if self.index is None:
            target.narrow(0, self.start, self.count).copy_(values)
        else:
            target.index_copy_(0, self.index, values)

    def scatter_add_(self, target: Tensor, values: Tensor) -> None:
        """target[selected] += values, in place; values [count, ...]. Values of a repeated token are summed."""
        if self.index is None:
            target.narrow(0, self.start, self.count).add_(values)
        else:
            target.index_add_(0, self.index, values.to(target.dtype))


def gather_tables(tables: T) -> HostTables[T]:
    """Copy the tensors of tables, all on the CPU and of any dtypes, into one page-locked buffer."""
    tensors: list[Tensor] = []
    map_tensors(tables, lambda one: tensors.append(one) or one)  # type: ignore[func-returns-value]
    starts, size = [], 0
    for one in tensors:
        starts.append(size)
        size += -(-one.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = page_locked((size,), torch.uint8)
    views = iter([_view(buffer, start, one.shape, one.dtype) for start, one in zip(starts, tensors, strict=True)])
    return HostTables(map_tensors(tables, lambda one: next(views).copy_(one)), buffer)


def map_tensors(tables: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace every tensor in tables by what `change` makes of it, in the order of fields and items."""
    if isinstance(tables, Tensor):
        return change(tables)
    if isinstance(tables, (tuple, list)):
        return type(tables)(map_tensors(one, change) for one in tables)
    if isinstance(tables, dict):
        return {key: map_tensors(one, change) for key, one in tables.items()}
    if dataclasses.is_dataclass(tables) and not isinstance(tables, type):
        changed = {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}
        return dataclasses.replace(tables, **map_tensors(changed, change))
    return tables


def _view(buffer: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in a buffer of bytes, from byte `start` on."""
    stop = start + shape.numel() * dtype.itemsize
    return buffer[start:stop].view(dtype).view(shape)
