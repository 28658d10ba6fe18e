"""Read folders of safetensors by byte range, without trusting their contents. (Writing: safetensors_writer.py.)

Layout of a file: 8 bytes length (little endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, data.
A folder holds `model.safetensors`, or shards and `model.safetensors.index.json` {"metadata", "weight_map"}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.dtypes import DTYPES
from megatron_vita.checkpoint.placed import PlacedTensors, TensorPlace
from megatron_vita.convert.hf_config import parse_json, read_json, section, shown, string
from megatron_vita.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_MAX_RANK = 32
"""Dimensions of a tensor. Published weights have at most 5."""
CODES = {one.code: one for one in DTYPES if one.code not in ("I8", "I16", "BOOL")}
"""Types of published weights. Other types are absent: they hold packed values, such as quantised ones."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class SafetensorsFolder(PlacedTensors):
    """The tensors of one Hugging Face folder. Opening checks names, shapes, sizes and offsets of all files."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for what no publisher would write: no weights or only pickled ones, an index that
        leaves the folder or disagrees with its files, truncated files, overlapping or unnamed bytes."""
        super().__init__({})
        self.folder = folder
        if (folder / INDEX_FILE).is_file():
            self._open_index(folder / INDEX_FILE)
        elif (folder / SINGLE_FILE).is_file():
            self._places = _read_header(folder / SINGLE_FILE)
        else:
            raise CheckpointError(_no_weights(folder))

    def _open_index(self, path: Path) -> None:
        weight_map = section(read_json(path), "weight_map", str(path))
        if weight_map is None:
            raise CheckpointError(f"{path}: has no weight_map. Download it again.")
        for tensor in weight_map:
            string(weight_map, tensor, "", f"{path}: weight_map")
        files = sorted(set(weight_map.values()))
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


def _read_header(path: Path) -> dict[str, TensorPlace]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: truncated, or no safetensors file. Download it again.")
            header = parse_json(file.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        entries = [_entry(name, values) for name, values in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header ({type(error).__name__}: {error}). Download it again.") from None
    places, end = {}, 0
    for one in sorted(entries, key=lambda one: (one.start, one.stop)):
        if one.code not in CODES:
            raise CheckpointError(
                f"{path}: {one.name} has type {one.code}, which is not supported (quantised weights must be "
                f"dequantised first). Supported: {', '.join(CODES)}."
            )
        dtype = CODES[one.code]
        if one.stop - one.start != math.prod(one.shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {one.name} has offsets {one.start}..{one.stop} that do not fit its shape {one.shape}."
            )
        if one.start != end:
            what = "overlaps the tensor before it" if one.start < end else "leaves bytes before it that belong to none"
            raise CheckpointError(f"{path}: {one.name} at {one.start}..{one.stop} {what}. Download it again.")
        places[one.name] = TensorPlace(path, dtype, one.shape, 8 + length + one.start)
        end = one.stop
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header describes {8 + length + end}. Download it again.")
    return places


@dataclass(frozen=True)
class _Entry:
    """One tensor as a header describes it."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _entry(name: str, values: Mapping[str, Any]) -> _Entry:
    """Raises ValueError, KeyError or TypeError for an invalid description of a tensor."""
    offsets, shape, code = values["data_offsets"], values["shape"], values["dtype"]
    if not (isinstance(offsets, list) and isinstance(shape, list) and isinstance(code, str)):
        raise TypeError(f"{shown(name)}: dtype must be a string, shape and data_offsets lists")
    start, stop = offsets
    if len(shape) > _MAX_RANK:
        raise ValueError(f"{shown(name)}: {len(shape)} dimensions")
    for number in (start, stop, *shape):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"{shown(name)}: {shown(number)} is no size")
    return _Entry(name, code, tuple(shape), start, stop)


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
