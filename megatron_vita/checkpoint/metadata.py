"""`.metadata` of torch.distributed.checkpoint, read without running it: which part of which tensor lies where.

The file is a pickle of torch.distributed.checkpoint.metadata.Metadata, and torch's own reader would import and call
whatever it names. Here every class becomes an inert record of its fields, and what comes out is checked: a file that
claims to hold more, elsewhere, or twice is refused.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_vita.checkpoint.boxes import Slices, fills, slices_at
from megatron_vita.errors import CheckpointError

METADATA_FILE = ".metadata"
DTYPES = {
    str(one).removeprefix("torch."): one
    for one in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""Types of elements that are supported, by torch's name."""
_MAX_DIMENSIONS = 32
_FIELDS = {
    f"{kind.__module__}.{kind.__name__}": tuple(one.name for one in dataclasses.fields(kind))
    for kind in (
        torch_metadata.Metadata,
        torch_metadata.MetadataIndex,
        torch_metadata.TensorStorageMetadata,
        torch_metadata.ChunkStorageMetadata,
        torch_metadata.TensorProperties,
        _StorageInfo,
    )
}
"""The classes that are looked into, with their fields in the order of their arguments and of their state."""
_IGNORED = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(StorageMeta|BytesStorageMetadata|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData|BytesIOWriteData)"
    r"|torch\.serialization\._get_layout|pathlib\.(_local\.)?(PosixPath|PurePosixPath)"
)
"""What the file may name besides, and nobody looks at: megatron-core's writer adds the plans of the ranks."""


@dataclass(frozen=True)
class StoredPiece:
    """One part of one tensor, and where it lies."""

    box: Slices
    """The part."""
    file: str
    """Below the checkpoint's folder."""
    position: int
    """First byte in the file."""
    length: int
    """Bytes in the file: those of torch.save of the part."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]


def parse_metadata(content: bytes, where: Path) -> dict[str, StoredTensor]:
    """The tensors that a `.metadata` file describes, by key.

    Raises:
        CheckpointError: it names what a checkpoint has no business with, or what it says cannot be so.
    """
    try:
        return _tensors(_Inert(io.BytesIO(content)).load())
    except _SenselessError as error:
        raise CheckpointError(f"{where}: refused, {error}. Do not use this checkpoint.") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise CheckpointError(f"{where}: refused, it is damaged ({error}). Do not use this checkpoint.") from error


class _SenselessError(CheckpointError):
    """What the file says cannot be so."""


class _Record:
    """An object of any class, as the fields that it was made with."""

    fields: tuple[str, ...] = ()
    values: dict[str, Any]

    def __new__(cls, *arguments: Any) -> _Record:  # pickle makes an object with its arguments, or without and a state
        one = super().__new__(cls)
        one.values = dict(zip(cls.fields, arguments, strict=False))
        return one

    def __setstate__(self, state: Any) -> None:
        if type(state) is tuple:  # TensorProperties' __getstate__ makes it one
            state = dict(zip(self.fields, state, strict=False))
        if type(state) is not dict:
            raise _SenselessError("the state of an object is no list of fields")
        self.values.update((name, state[name]) for name in self.fields if name in state)


class _Inert(pickle.Unpickler):
    """Makes records of the classes of a checkpoint, and refuses every other name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in ("torch.Size", "collections.OrderedDict"):
            return tuple if name == "Size" else dict
        if full not in _FIELDS and not _IGNORED.fullmatch(full):
            raise _SenselessError(f"it names {full[:200]}, which a checkpoint has no business with")
        # new classes for every file: a hostile one may write into them
        return self._classes.setdefault(full, type(name, (_Record,), {"fields": _FIELDS.get(full, ())}))


def _fields(record: Any, name: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise _SenselessError(f"it has something else in the place of {name}")
    return record.values


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _SenselessError("a size, an offset or a length is no natural number")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > _MAX_DIMENSIONS:
        raise _SenselessError("a size is no list of numbers")
    return tuple(map(_number, values))


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    fields = _fields(metadata, "Metadata")
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(described) is not dict or type(stored) is not dict:
        raise _SenselessError("it does not describe a checkpoint")
    left = _places(stored)
    tensors = {}
    for key, one in described.items():
        if type(key) is not str:
            raise _SenselessError("a tensor's name is no text")
        if type(one).__name__ != "BytesStorageMetadata":
            tensors[key] = _tensor(key, _fields(one, "TensorStorageMetadata"), left)
    return tensors


_Places = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]


def _places(stored: dict[Any, Any]) -> _Places:
    """(file, position, length) of each part, by the tensor's name and the part's offsets."""
    places: _Places = {}
    files: set[str] = set()
    for key, one in stored.items():
        index, place = _fields(key, "MetadataIndex"), _fields(one, "_StorageInfo")
        name, offsets, file = index.get("fqn"), index.get("offset"), place.get("relative_path")
        if type(name) is not str or type(file) is not str:
            raise _SenselessError("a part has no name or no file")
        if file not in files:
            if file in ("", ".") or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise _SenselessError(f"{name[:200]} is said to lie in {file[:200]!r}, outside of it")
            files.add(file)
        if place.get("transform_descriptors"):
            raise _SenselessError(
                f"{name[:200]} was transformed when it was written (compressed?), which is not supported"
            )
        if offsets is None:
            continue  # not of a tensor
        at = (name, _numbers(offsets))
        if at in places:
            raise _SenselessError(f"a part of {name[:200]} lies in two places")
        places[at] = (file, _number(place.get("offset")), _number(place.get("length")))
    return places


def _tensor(key: str, fields: dict[str, Any], left: _Places) -> StoredTensor:
    """One tensor. Its places are taken away, so that work is bounded by their number and none is used twice."""
    dtype = _fields(fields.get("properties"), "TensorProperties").get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise _SenselessError(f"{key[:200]} has no type")
    shape = _numbers(fields.get("size"))
    chunks = fields.get("chunks")
    if type(chunks) is not list:
        raise _SenselessError(f"{key[:200]} has no parts")
    pieces = []
    for chunk in chunks:
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _numbers(part.get("offsets")), _numbers(part.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + extent > whole for start, extent, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise _SenselessError(f"a part of {key[:200]} leaves it")
        place = left.pop((key, offsets), None)
        if place is None:
            raise _SenselessError(f"a part of {key[:200]} lies nowhere, or stands there twice")
        pieces.append(StoredPiece(slices_at(offsets, sizes), *place))
    if not fills([one.box for one in pieces], shape):
        raise _SenselessError(f"the parts of {key[:200]} do not hold each of its elements once")
    return StoredTensor(shape, dtype, tuple(pieces))
