"""Files of torch.save without torch: tensors in them become places of the file, and what surrounds a tensor is made.

torch.save's format (since torch 1.6): an uncompressed zip of PREFIX/data.pkl and, for each storage, PREFIX/data/KEY
with its bytes in the order of PREFIX/byteorder. A tensor in the pickle is the call of a rebuild function on (storage,
offset, size, stride, ...), a storage the persistent id ("storage", type, KEY, device, elements). Reading one runs
nothing of it: see pickles.py. torch's own description: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from megatron_vita.checkpoint.dtypes import DType, by_storage
from megatron_vita.checkpoint.pickle_writer import dumps
from megatron_vita.checkpoint.pickles import Name, Persistent, Record, refused, run
from megatron_vita.checkpoint.placed import TensorPlace
from megatron_vita.checkpoint.zips import NAMES_OF_NO_TENSOR, NAMES_OF_TENSOR, View, Zip, ZipMember, read_directory
from megatron_vita.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Bytes of data.pkl: those of a 72B model's ranks have less than 1 MiB."""
MAX_DIMENSIONS = 64
"""Of a tensor, as torch's own limit is."""
_TENSOR_CALLS = {
    Name("torch._utils", "_rebuild_tensor"),
    Name("torch._utils", "_rebuild_tensor_v2"),
    Name("torch_npu.utils.storage", "_rebuild_npu_tensor"),
    Name("torch_npu.utils._module", "_rebuild_npu_tensor"),
}
"""(storage, offset, size, stride, ...) -> tensor. Ascend's have one more argument, of the device's own."""
_PARAMETER_CALLS = {Name("torch._utils", "_rebuild_parameter"), Name("torch._utils", "_rebuild_parameter_with_state")}
"""(tensor, ...) -> the tensor."""


@dataclass
class TorchFile:
    """One file of torch.save.

    Raises (when it is opened):
        CheckpointError: no such file, or one that torch.save does not write.
    """

    path: Path
    content: Any = field(init=False)
    """What was saved: dictionaries, lists, tuples and plain values, TensorPlace for tensors, Record and Name for the
    rest."""

    def __post_init__(self) -> None:
        try:
            with self.path.open("rb") as file:
                self.content = _Archive(file, self.path).content()
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file. The download is incomplete.") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}.") from None


def tensor_in(view: memoryview, where: Path) -> tuple[int, tuple[int, ...], DType]:
    """Where the elements of the one contiguous tensor in the bytes of a file of torch.save lie.

    Args:
        view: of bytes.
        where: the file, for messages.

    Returns:
        First byte, shape, and type of the elements.

    Raises:
        CheckpointError: anything else was saved, or the bytes are damaged.
    """
    content = _Archive(cast(IO[bytes], View(view)), where).content()
    if not isinstance(content, TensorPlace):
        raise refused(where, "it holds something else than one tensor")
    return content.start, content.shape, content.dtype


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    """Bytes of one member of the zip."""

    start: int
    dtype: DType
    elements: int


class _Archive:
    """One zip of torch.save, in a stream that can be sought."""

    def __init__(self, stream: IO[bytes], where: Path) -> None:
        self._stream = stream
        self._where = where
        self._members = read_directory(stream, where)

    def content(self) -> Any:
        """What was saved, with places in the stream for tensors."""
        pickle = self._members.get("data.pkl")
        if pickle is None or pickle.size > MAX_PICKLE:
            size = "no" if pickle is None else f"{pickle.size} bytes of"
            raise CheckpointError(f"{self._where}: {size} data.pkl, not a file of torch.save. Download it again.")
        order = self._members.get("byteorder")
        if order is not None and (order.size > 6 or self._read(order) != b"little"):
            raise CheckpointError(f"{self._where}: was saved on a big-endian machine, which is not supported.")
        return run(self._read(pickle), self._where, persistent=self._storage, calls=self._called)

    def _read(self, member: ZipMember) -> bytes:
        self._stream.seek(member.start)
        return self._stream.read(member.size)

    def _storage(self, identity: Any) -> _Storage:
        """A storage from its persistent id."""
        if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
            raise refused(self._where, "its pickle refers to what is no storage")
        kind, key, elements = identity[1], identity[2], identity[4]
        dtype = by_storage(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            name = str(kind)[:80] if isinstance(kind, Name) else "no type"
            raise refused(self._where, f"a storage of the kind {name}, which is not supported")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise refused(self._where, "a storage without name or size")
        member = self._members.get("data/" + key)
        if member is None or member.size < elements * dtype.itemsize:
            size = "is missing" if member is None else f"has {member.size} bytes"
            raise CheckpointError(f"{self._where}: storage {key[:40]} {size}. Download it again.")
        return _Storage(member.start, dtype, elements)

    def _called(self, name: Name, arguments: Any) -> Any:
        if name in _TENSOR_CALLS:
            return self._tensor(arguments)
        if name in _PARAMETER_CALLS and type(arguments) is tuple and isinstance(arguments[0], TensorPlace):
            return arguments[0]
        return NotImplemented

    def _tensor(self, arguments: tuple[Any, ...]) -> TensorPlace:
        """A tensor from the arguments of its rebuild call."""
        storage, offset, size, stride = arguments[:4]
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise refused(self._where, "a tensor whose strides do not fit its shape")
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or any(type(one) is not int or not 0 <= one < 1 << 63 for one in numbers):
            raise refused(self._where, "a tensor whose place makes no sense")
        count, step = math.prod(size), 1
        for extent, distance in zip(reversed(size), reversed(stride), strict=True):
            if extent != 1 and distance != step and count:
                raise refused(self._where, f"a tensor of shape {size[:8]} with gaps or turned around, as no weight is")
            step *= extent
        if offset + count > storage.elements:
            raise refused(self._where, f"a tensor of shape {size[:8]} that leaves its storage")
        start = storage.start + offset * storage.dtype.itemsize
        return TensorPlace(self._where, storage.dtype, tuple(size), start)


@functools.lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: DType) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the elements of one contiguous tensor: the same for all values.

    The bytes are those of torch 2.13 under torch.serialization.skip_data; the archive's CRC-32 of the elements is left
    out there and here, because torch does not read it. The elements begin at a multiple of 64 bytes.
    """
    count, strides = math.prod(shape), _strides(shape)
    storage = Persistent(("storage", Name("torch", dtype.storage), "0", "cpu", count))
    hooks = Record(Name("collections", "OrderedDict"), ())
    tensor = Record(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, hooks))
    zipped, size = Zip(), count * dtype.itemsize
    zipped.add("data.pkl", dumps(tensor))
    zipped.add_settings()
    start = zipped.begin("data/0", size)
    head = zipped.take()
    zipped.end("data/0", start, size, 0)
    return head, zipped.finish(NAMES_OF_TENSOR)


@functools.lru_cache(maxsize=1)
def empty_dict() -> bytes:
    """What torch.save writes for {}."""
    zipped = Zip()
    zipped.add("data.pkl", dumps({}))
    zipped.add_settings()
    return zipped.finish(NAMES_OF_NO_TENSOR)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours in each dimension; an empty one counts as one, as in torch."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
