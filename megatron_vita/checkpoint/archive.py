"""Files of torch.save without torch: tensors in them become places of the file, and what surrounds a tensor is made.

torch.save's format (since torch 1.6): an uncompressed zip of PREFIX/data.pkl and, for each storage, PREFIX/data/KEY
with its bytes in the order of PREFIX/byteorder. A tensor in the pickle is the call of a rebuild function on (storage,
offset, size, stride, ...), a storage the persistent id ("storage", type, KEY, device, elements). Reading one runs
nothing of it: see pickles.py. torch's own description: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from megatron_vita.checkpoint.dtypes import DType, by_storage
from megatron_vita.checkpoint.pickle_writer import dumps
from megatron_vita.checkpoint.pickles import Name, Persistent, Record, refused, run
from megatron_vita.checkpoint.placed import TensorPlace
from megatron_vita.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Bytes of data.pkl: those of a 72B model's ranks have less than 1 MiB."""
MAX_MEMBERS = 1_000_000
"""Files in one zip."""
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
    content = _Archive(cast(IO[bytes], _View(view)), where).content()
    if not isinstance(content, TensorPlace):
        raise refused(where, "it holds something else than one tensor")
    return content.start, content.shape, content.dtype


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    """Bytes of one member of the zip."""

    start: int
    dtype: DType
    elements: int


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a member's bytes lie."""

    start: int
    size: int


class _Archive:
    """One zip of torch.save, in a stream that can be sought."""

    def __init__(self, stream: IO[bytes], where: Path) -> None:
        self._stream = stream
        self._where = where
        self._members = _read_directory(stream, where)

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

    def _read(self, member: _Member) -> bytes:
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


def _read_directory(stream: IO[bytes], where: Path) -> dict[str, _Member]:
    """Members of the zip by name below its one folder: each uncompressed, and inside the file."""
    try:
        total = stream.seek(0, os.SEEK_END)
        members = {}
        entries = zipfile.ZipFile(stream).infolist()
        if len(entries) > MAX_MEMBERS:
            raise CheckpointError(f"{where}: a zip of {len(entries)} files, not one of torch.save.")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(f"{where}: {entry.filename[:80]} is compressed or encrypted. Refused.")
            stream.seek(entry.header_offset)
            head = struct.unpack("<4s5H3I2H", stream.read(30))
            start = entry.header_offset + 30 + head[9] + head[10]
            if head[0] != b"PK\x03\x04" or start + entry.file_size > total:
                raise CheckpointError(f"{where}: {entry.filename[:80]} leaves the file. Download it again.")
            name = entry.filename.partition("/")[2]
            if name in members:
                raise CheckpointError(f"{where}: {name[:80]} stands in it twice. Download it again.")
            members[name] = _Member(start, entry.file_size)
        return members
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(
            f"{where}: not a zip as torch.save writes since torch 1.6 ({error}). Download it again; a file of an older "
            "torch must be saved anew in a sandbox."
        ) from None


class _View(io.RawIOBase):
    """A stream over bytes that are in memory, without the copy that BytesIO makes."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._view[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


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
    zipped, size = _Zip(), count * dtype.itemsize
    zipped.add("data.pkl", dumps(tensor))
    zipped.add_settings()
    start = zipped.begin("data/0", size)
    head = zipped.take()
    zipped.end("data/0", start, size, 0)
    return head, zipped.finish(_NAMES_OF_TENSOR)


@functools.lru_cache(maxsize=1)
def empty_dict() -> bytes:
    """What torch.save writes for {}."""
    zipped = _Zip()
    zipped.add("data.pkl", dumps({}))
    zipped.add_settings()
    return zipped.finish(_NAMES_OF_NO_TENSOR)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours in each dimension; an empty one counts as one, as in torch."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


_NAMES_OF_TENSOR = 15728199511854643026
_NAMES_OF_NO_TENSOR = 2908468677762923104
"""torch's hash of the names in the archive, one half of its serialization id. The id only tells archives apart."""
_ALIGNMENT = 64
_LARGE = (1 << 32) - 1
"""From here on a number has no room in a zip's usual fields."""
_UTF8, _DESCRIPTOR = 0x0800, 0x0008
"""Flags of a member: its name is UTF-8; its CRC-32 and sizes stand behind it, as torch has it unless it is empty."""


class _Zip:
    """A zip as torch's writer lays it out: each content aligned, its CRC-32 and sizes behind it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._at = 0
        self._directory: list[bytes] = []
        self._checksums = 0

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""
        start = self.begin(name, len(content))
        self._parts.append(content)
        self.end(name, start, len(content), zlib.crc32(content))

    def add_settings(self) -> None:
        """The members that say how the others are written."""
        self.add(".format_version", b"1")
        self.add(".storage_alignment", b"%d" % _ALIGNMENT)
        self.add("byteorder", b"little")

    def begin(self, name: str, size: int) -> int:
        """The header of a member, padded so that its content is aligned. Returns where the header begins."""
        start, path = self._at, _path(name)
        wide = _wide(size, 0, start)
        padding = -(start + 30 + len(path) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._append(struct.pack("<4s5H3I2H", b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(path), len(extra)))
        self._append(path + extra)
        return start

    def end(self, name: str, start: int, size: int, checksum: int) -> None:
        """What stands behind the content of a member, and its line in the directory."""
        self._at += size
        path, wide = _path(name), _wide(size, size, start)
        if size:
            self._append(struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", checksum, size, size))
            self._checksums = _combined(self._checksums, checksum)
        numbers = (checksum, min(size, _LARGE), min(size, _LARGE), len(path), len(wide), 0, 0, 0, 0, min(start, _LARGE))
        self._directory += (struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, _flags(size), 0, 0, 0, *numbers), path, wide)

    def take(self) -> bytes:
        """What was written since the last time, without contents that were not given."""
        written = b"".join(self._parts)
        self._parts = []
        return written

    def finish(self, names: int) -> bytes:
        """The last members and the directory. `names` is torch's hash of the others' names."""
        self.add("version", b"3\n")
        self.add(".data/serialization_id", b"%020d%020d" % (names, self._checksums))
        start, size, count = self._at, sum(map(len, self._directory)), len(self._directory) // 3
        self._parts += self._directory
        numbers = (44, 0x031E, 45, 0, 0, count, count, size, start)
        self._parts.append(struct.pack("<4sQ2H2I4Q", b"PK\6\6", *numbers))
        self._parts.append(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
        self._parts.append(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(start, _LARGE), 0))
        return self.take()

    def _append(self, content: bytes) -> None:
        self._parts.append(content)
        self._at += len(content)


def _path(name: str) -> bytes:
    return b"archive/" + name.encode()


def _flags(size: int) -> int:
    return _UTF8 | _DESCRIPTOR if size else _UTF8


def _wide(size: int, compressed: int, start: int) -> bytes:
    """The extra field for numbers that have no room in a zip's usual fields."""
    numbers = [*((size, compressed) if size >= _LARGE else ()), *((start,) if start >= _LARGE else ())]
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _combined(seed: int, value: int) -> int:
    """torch's c10::hash_combine, of 64 bits."""
    return (seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & ((1 << 64) - 1)
