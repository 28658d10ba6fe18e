"""`.metadata` of torch.distributed.checkpoint, read and written without torch: which part of which tensor lies where.

The file is a pickle of torch.distributed.checkpoint.metadata.Metadata. It is written as calls of torch's classes with
the arguments that all versions since 2.6 know, so that each gives fields of its own their defaults (the version of
Metadata, which 2.6 does not have, is given as state, which any class takes). It is read by the names of fields, as
Python's pickler writes them, and by their order, as we do. Compared: the classes of torch 2.13 in the tests, and those
of 2.5 and before by their sources, in which _StorageInfo has no transform_descriptors and Metadata no version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vita.checkpoint.archive import MAX_DIMENSIONS
from megatron_vita.checkpoint.dtypes import DType, by_name
from megatron_vita.checkpoint.lazy import fills, slices_at
from megatron_vita.checkpoint.pickle_writer import dumps
from megatron_vita.checkpoint.pickles import Name, Record, run
from megatron_vita.errors import CheckpointError

MAX_STEPS = 20_000_000
"""Instructions of one file: a piece takes about 60, a 72B model has 9,000 pieces, with its optimizer on 512 ranks
200,000."""
VERSION = "1.0.0"
"""Of Metadata."""

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA = Name(_MODULE, "Metadata")
_INDEX = Name(_MODULE, "MetadataIndex")
_STORAGE_META = Name(_MODULE, "StorageMeta")
_TENSOR = Name(_MODULE, "TensorStorageMetadata")
_BYTES = Name(_MODULE, "BytesStorageMetadata")
_CHUNK = Name(_MODULE, "ChunkStorageMetadata")
_PROPERTIES = Name(_MODULE, "TensorProperties")
_PLACE = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Name("torch", "Size")
_FIELDS = {
    _METADATA: ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"),
    _INDEX: ("fqn", "offset", "index"),
    _TENSOR: ("properties", "size", "chunks"),
    _CHUNK: ("offsets", "sizes"),
    _PROPERTIES: ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
    _PLACE: ("relative_path", "offset", "length", "transform_descriptors"),
}
"""Fields in the order of the classes' arguments."""
_KNOWN = {
    *_FIELDS,
    _STORAGE_META,
    _BYTES,
    _SIZE,
    Name(_MODULE, "_MEM_FORMAT_ENCODING"),
    Name("torch.serialization", "_get_layout"),
    Name("collections", "OrderedDict"),
    *(
        Name("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    ),
    *(Name(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}
"""What the file may name: the classes that describe tensors, those of the ranks' plans, which megatron-core's writer
adds to Metadata, and those of the path in StorageMeta."""


@dataclass(frozen=True)
class StoredPiece:
    """One part of one tensor, and where it lies."""

    offsets: tuple[int, ...]
    """Its first element in the tensor."""
    sizes: tuple[int, ...]
    """Its shape."""
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
    dtype: DType
    pieces: tuple[StoredPiece, ...]


def metadata_bytes(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The content of `.metadata`, as torch and megatron-core read it. Tensors and pieces keep their order."""
    described, places = {}, {}
    for key, tensor in tensors.items():
        chunks = []
        for index, piece in enumerate(tensor.pieces):
            offsets = _size(piece.offsets)
            chunks.append(Record(_CHUNK, (offsets, _size(piece.sizes))))
            places[Record(_INDEX, (key, piece.offsets, index))] = Record(
                _PLACE, (piece.file, piece.position, piece.length)
            )
        properties = Record(_PROPERTIES, (Name("torch", tensor.dtype.name),))
        described[key] = Record(_TENSOR, (properties, _size(tensor.shape), chunks))
    arguments = (described, None, places, Record(_STORAGE_META, ()))
    return dumps(Record(_METADATA, arguments, {"version": VERSION}))


def _size(numbers: tuple[int, ...]) -> Record:
    return Record(_SIZE, (numbers,))


def parse_metadata(content: bytes, where: Path) -> dict[str, StoredTensor]:
    """The tensors that `.metadata` describes, in its order; entries that are no tensors are left out.

    Args:
        content: of the file; nothing of it is run.
        where: the file, for messages.

    Raises:
        CheckpointError: it names anything but the classes that describe tensors, is damaged, or describes what cannot
            be: parts outside their tensor, twice or missing, places that are no places.
    """

    def checked(name: Name) -> None:
        if name not in _KNOWN and not (name.module == "torch" and by_name(name.name)):
            raise _refused(where, f"it names {str(name)[:200]}, which a checkpoint has no business with")

    try:
        metadata = run(content, where, calls=_called, names=checked, max_steps=MAX_STEPS)
        return _tensors(metadata)
    except _SenselessError as error:
        raise _refused(where, str(error)) from None


def _refused(where: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: refused, {what}. Do not use this checkpoint.")


class _SenselessError(CheckpointError):
    """What the file says cannot be so."""


def _called(name: Name, arguments: Any) -> Any:
    if name == _SIZE and type(arguments) is tuple and len(arguments) == 1:
        return _numbers(arguments[0])
    return NotImplemented


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _SenselessError("a size, an offset or a length is no natural number")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > MAX_DIMENSIONS:
        raise _SenselessError("a size is no list of numbers")
    return tuple(map(_number, values))


def _fields(record: Any, call: Name) -> dict[str, Any]:
    """The fields of an object of one class, from the arguments and the state it was made with."""
    if type(record) is not Record or record.call != call or type(record.arguments) is not tuple:
        raise _SenselessError(f"it has something else in the place of {call.name}")
    names = _FIELDS[call]
    state = record.state
    if call == _PROPERTIES and type(state) is tuple:  # its __getstate__ makes it one
        state = dict(zip(names, state, strict=False))
    elif state is None:
        state = {}
    elif type(state) is not dict or len(state) > 2 * len(names):
        raise _SenselessError(f"the fields of {call.name} are not its own")
    return {**dict(zip(names, record.arguments, strict=False)), **state}


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    fields = _fields(metadata, _METADATA)
    described, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(described) is not dict or type(places) is not dict:
        raise _SenselessError("it does not describe a checkpoint")
    left = _places(places)
    tensors = {}
    for key, one in described.items():
        if type(key) is not str:
            raise _SenselessError("a tensor's name is no text")
        if not (type(one) is Record and one.call == _BYTES):
            tensors[key] = _tensor(key, _fields(one, _TENSOR), left)
    return tensors


_Places = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]


def _places(stored: dict[Any, Any]) -> _Places:
    """(file, position, length) of each part, by the tensor's name and the part's offsets."""
    places: _Places = {}
    files: set[str] = set()
    for key, one in stored.items():
        index, place = _fields(key, _INDEX), _fields(one, _PLACE)
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
    dtype = _fields(fields.get("properties"), _PROPERTIES).get("dtype")
    found = by_name(dtype.name) if type(dtype) is Name and dtype.module == "torch" else None
    if found is None:
        raise _SenselessError(f"{key[:200]} has no type")
    shape = _numbers(fields.get("size"))
    chunks = fields.get("chunks")
    if type(chunks) is not list:
        raise _SenselessError(f"{key[:200]} has no parts")
    pieces = []
    for chunk in chunks:
        part = _fields(chunk, _CHUNK)
        offsets, sizes = _numbers(part.get("offsets")), _numbers(part.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + extent > whole for start, extent, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise _SenselessError(f"a part of {key[:200]} leaves it")
        place = left.pop((key, offsets), None)
        if place is None:
            raise _SenselessError(f"a part of {key[:200]} lies nowhere, or stands there twice")
        pieces.append(StoredPiece(offsets, sizes, *place))
    if not fills([slices_at(one.offsets, one.sizes) for one in pieces], shape):
        raise _SenselessError(f"the parts of {key[:200]} do not hold each of its elements once")
    return StoredTensor(shape, found, tuple(pieces))
