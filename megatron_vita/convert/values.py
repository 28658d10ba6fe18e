"""Values of tensors bit for bit, and the names of their types."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import runs, whole
from megatron_vita.checkpoint.tensors import LazyTensors, TensorsInMemory

CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""safetensors' names of the types of published weights. Other types hold packed values, such as quantised ones."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_BYTES = 32 << 20


class FreshTensors(TensorsInMemory):
    """Tensors that no file holds: initial values of new parameters."""


def type_name(dtype: torch.dtype) -> str:
    """torch's name of a type, as config.json says it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: zeros of two signs differ, equal NaNs do not."""
    return a.dtype == b.dtype and torch.equal(*(one.view(_INTEGERS[one.dtype.itemsize]) for one in (a, b)))


def same_tensors(source: LazyTensors, first: str, second: str) -> bool:
    """Whether two tensors of a source are equal bit for bit; read block by block."""
    shape, dtype = source.shape(first), source.dtype(first)
    return (shape, dtype) == (source.shape(second), source.dtype(second)) and all(
        same_bits(source.read(first, slices), source.read(second, slices))
        for slices in runs(whole(shape), dtype.itemsize, _BLOCK_BYTES)
    )
