"""Pickles of a checkpoint, read so that nothing runs: an allow-list of what they may name, and tensors."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vita.checkpoint.streams import raw, shaped
from megatron_vita.errors import CheckpointError

_SAFE_GLOBALS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
"""What `.metadata` may name: the classes that describe tensors, none of which does anything when built."""
_DTYPE_NAMES = {str(one).removeprefix("torch.") for one in vars(torch).values() if isinstance(one, torch.dtype)}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE_GLOBALS or (module == "torch" and name in _DTYPE_NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no business with")


def parse_metadata(content: bytes, where: Path) -> Metadata:
    """Unpickle `.metadata` with an allow-list.

    Raises:
        CheckpointError: it names anything but the classes that describe tensors, or is damaged. Nothing has run then.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        raise CheckpointError(f"{where}: refused, {error}. Do not use this checkpoint.") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{where}: does not describe a checkpoint. Do not use it.")
    return metadata


class _Bytes(io.RawIOBase):
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
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._view[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def elements(content: Tensor, where: Path) -> Any:
    """The tensor in the bytes of one piece, in place where it lies as we write it, loaded anew otherwise."""
    view = raw(content)
    outline = load_pickled(_Bytes(view), where, location="meta")
    if not isinstance(outline, Tensor):
        return outline
    start = getattr(outline.untyped_storage(), "_checkpoint_offset", -1)
    plain = outline.is_contiguous() and not outline.storage_offset() and start >= 0
    if not plain or start % outline.dtype.itemsize or start + outline.nbytes > len(view):
        return load_pickled(_Bytes(view), where)
    return shaped(content[start:], outline.shape, outline.dtype)


def load_pickled(stream: Any, where: Path, location: str = "cpu") -> Any:
    """torch.load that builds tensors and plain values only, whatever the environment says.

    Args:
        stream: of bytes that can be sought.
        location: `meta` builds tensors without their elements.

    Raises:
        CheckpointError: the content names anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location=location, weights_only=True)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{where}: refused, {first_line}. Do not use this checkpoint.") from None
