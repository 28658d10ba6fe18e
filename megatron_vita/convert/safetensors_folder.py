"""Folders of safetensors: read by byte range, written tensor by tensor, trusted in nothing.

Layout of a file: 8 bytes length (little endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, data.
A folder holds `model.safetensors`, or shards and `model.safetensors.index.json` {"metadata", "weight_map"}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.checkpoint.lazy import LazyTensors, Region, extent, whole
from megatron_vita.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_MAX_HEADER = 100 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Place:
    """Where one tensor's bytes lie."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFolder(LazyTensors):
    """The tensors of one Hugging Face folder. Opening checks names, shapes, sizes and offsets of all files."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for what no publisher would write: no weights or only pickled ones, an index that
        leaves the folder or disagrees with its files, truncated files, overlapping or unnamed bytes."""
        self.folder = folder
        self._places: dict[str, _Place] = {}
        if (folder / INDEX_FILE).is_file():
            self._open_index(folder / INDEX_FILE)
        elif (folder / SINGLE_FILE).is_file():
            self._places = _read_header(folder / SINGLE_FILE)
        else:
            raise CheckpointError(_no_weights(folder))

    def _open_index(self, path: Path) -> None:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a readable index ({error!r}). Download it again.") from None
        if (self.folder / SINGLE_FILE).is_file() and SINGLE_FILE not in files:
            raise CheckpointError(
                f"{self.folder}: holds both {SINGLE_FILE} and an index of other files. Delete the set that is stale."
            )
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{path}: points to {name!r}, not a safetensors file inside the folder. Refused.")
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{path}: names {name}, which is not there. Download the folder again.")
            for tensor, place in _read_header(file).items():
                if tensor in self._places:
                    other = self._places[tensor].file.name
                    raise CheckpointError(f"{self.folder}: {tensor} lies in both {other} and {name}. Delete one.")
                if weight_map.get(tensor) != name:
                    raise CheckpointError(
                        f"{file}: holds {tensor}, which the index expects in {weight_map.get(tensor)}. "
                        "Files of different downloads are mixed: download the folder again."
                    )
                self._places[tensor] = place
        missing = sorted(set(weight_map) - set(self._places))
        if missing:
            raise CheckpointError(f"{path}: names {missing[0]}, which {weight_map[missing[0]]} does not hold.")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str, region: Region | None = None) -> Tensor:
        place = self._places[name]
        region = whole(place.shape) if region is None else region
        if not region or any(one.stop <= one.start for one in region):
            rows, inner = slice(0, 1 if not region else 0), 1
        else:
            rows, inner = _leading_run(place.shape, region)
        item = place.dtype.itemsize
        content = bytearray((rows.stop - rows.start) * inner * item)
        if not content:
            return torch.empty(extent(region), dtype=place.dtype)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start + rows.start * inner * item)
            view, done = memoryview(content), 0
            while done < len(content):
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{place.file}: ends inside {name}. Download it again.")
                done += got
        flat = torch.frombuffer(content, dtype=place.dtype)
        if not region:
            return flat.reshape(())
        lead = _lead(place.shape)
        outer = place.shape[:lead] if lead else ()
        block = flat.reshape(*outer, rows.stop - rows.start, *place.shape[lead + 1 :])
        inside = (*(slice(0, 1) for _ in outer), slice(0, rows.stop - rows.start), *region[lead + 1 :])
        return block[inside].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_safetensors(folder: Path, tensors: LazyTensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write one file, or shards with an index, in the tensors' order. One tensor is in memory at a time.

    Returns:
        Bytes of tensor data.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = _bytes(tensors, name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return _write_file(folder / SINGLE_FILE, tensors, shards[0])
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(folder / file, tensors, names)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(path: Path, tensors: LazyTensors, names: Sequence[str]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        size = _bytes(tensors, name)
        code = _DTYPE_CODES.get(tensors.dtype(name))
        if code is None:
            raise CheckpointError(f"{name}: {tensors.dtype(name)} cannot be exported. Convert it first.")
        header[name] = {"dtype": code, "shape": list(tensors.shape(name)), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of eight, as other writers have it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].contiguous()
            assert tuple(tensor.shape) == tensors.shape(name), f"{name}: {tuple(tensor.shape)} was read"
            assert tensor.dtype == tensors.dtype(name), f"{name}: {tensor.dtype} was read"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return offset


def _read_header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: truncated, or no safetensors file. Download it again.")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda one: (one[1]["data_offsets"], one[0])):
            start, stop = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has type {entry['dtype']}, which is not supported (quantised weights must be "
                    f"dequantised first). Supported: {', '.join(_DTYPES)}."
                )
            dtype = _DTYPES[entry["dtype"]]
            if start != end or stop - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise CheckpointError(f"{path}: {name} has offsets {start}..{stop} that do not fit its shape {shape}.")
            places[name] = _Place(path, dtype, shape, 8 + length + start)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header ({error!r}). Download it again.") from None
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header describes {8 + length + end}. Download it again.")
    return places


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder. Give a downloaded Hugging Face folder."
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: holds pickled weights ({pickled[0]}), which can run code when read, and no safetensors. "
            "Download the safetensors revision, or convert it in a sandbox with transformers' save_pretrained."
        )
    return f"{folder}: holds no {SINGLE_FILE} and no {INDEX_FILE}. Is the download complete?"


def _bytes(tensors: LazyTensors, name: str) -> int:
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize


def _lead(shape: Sequence[int]) -> int:
    """Leading dimensions of size 1 before the one whose rows are read."""
    lead = 0
    while lead < len(shape) - 1 and shape[lead] == 1:
        lead += 1
    return lead


def _leading_run(shape: Sequence[int], region: Region) -> tuple[slice, int]:
    """(rows, elements of a row): the contiguous run of bytes that holds a region."""
    lead = _lead(shape)
    return region[lead], math.prod(shape[lead + 1 :])
