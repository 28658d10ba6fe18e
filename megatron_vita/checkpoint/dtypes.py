"""Types of elements, and tensors as the bits that they are: moving weights needs no more, and so no torch.

Importing torch takes longer than converting a small model. Only what computes with values imports it, where it does.
Bits are numpy arrays of unsigned integers of the elements' size, so that an array's shape is the tensor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vita.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Bits = NDArray[Any]
"""The elements of a tensor as unsigned integers of their size."""
_UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class DType:
    """The type of a tensor's elements, under the names that formats have for it."""

    name: str
    """torch's, e.g. `bfloat16`."""
    itemsize: int
    """Bytes of one element."""
    code: str
    """safetensors' name, e.g. `BF16`."""
    storage: str
    """The class of torch that pickles name, e.g. `BFloat16Storage`."""

    @property
    def bits(self) -> np.dtype[Any]:
        """numpy's unsigned integer of the same size."""
        return _UNSIGNED[self.itemsize]

    @property
    def floating(self) -> bool:
        """Whether elements are numbers that weights can be, and not packed codes or places."""
        return self.name.startswith(("float", "bfloat"))

    def __str__(self) -> str:
        return self.name


FLOAT64 = DType("float64", 8, "F64", "DoubleStorage")
FLOAT32 = DType("float32", 4, "F32", "FloatStorage")
FLOAT16 = DType("float16", 2, "F16", "HalfStorage")
BFLOAT16 = DType("bfloat16", 2, "BF16", "BFloat16Storage")
DTYPES = (
    FLOAT64,
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
)
"""All that are supported."""
_BY_NAME = {one.name: one for one in DTYPES}
_BY_STORAGE = {one.storage: one for one in DTYPES}


def by_name(name: str) -> DType | None:
    """The type of one of torch's names, or none."""
    return _BY_NAME.get(name)


def by_storage(storage: str) -> DType | None:
    """The type of one of torch's storage classes, or none."""
    return _BY_STORAGE.get(storage)


def dtype_of(tensor: Tensor) -> DType:
    """The type of a tensor's elements. Raises CheckpointError for one that is not supported."""
    found = by_name(str(tensor.dtype).removeprefix("torch."))
    if found is None:
        raise CheckpointError(f"a tensor of type {tensor.dtype} cannot be saved or converted. Convert it first.")
    return found


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's type."""
    import torch

    found: torch.dtype = getattr(torch, dtype.name)
    return found


def all_zero(bits: Bits, dtype: DType) -> bool:
    """Whether every element is zero; a negative zero is one, too."""
    return not np.any(bits << 1 if dtype.floating else bits)


def bits_of(tensor: Tensor) -> Bits:
    """The bits of a tensor in this machine's memory, not copied: what is written there is the tensor's."""
    import torch

    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    bits: Bits = tensor.detach().view(signed).numpy()
    return bits.view(_UNSIGNED[tensor.dtype.itemsize])


def as_tensor(bits: Bits, dtype: DType) -> Tensor:
    """A tensor over the same memory."""
    import torch

    signed = bits.view(f"i{dtype.itemsize}" if dtype.itemsize > 1 else "u1")
    return torch.from_numpy(signed).view(torch_dtype(dtype))
