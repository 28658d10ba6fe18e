"""Read folders of safetensors, without trusting their contents. (Writing: safetensors_writer.py.)

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json` {"metadata", "weight_map"}.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.convert.hf_config import parse_json, read_json, section, shown, string
from megatron_vita.convert.values import CODES
from megatron_vita.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class SafetensorsFolder(TensorsInMemory):
    """The tensors of one Hugging Face folder, mapped into memory: what is read of them is loaded page by page and let
    go when memory is short. Opening checks names, shapes, sizes and offsets of all files."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for what no publisher would write: no weights or only pickled ones, an index that
        leaves the folder or disagrees with its files, truncated files, overlapping or unnamed bytes."""
        if (folder / INDEX_FILE).is_file():
            super().__init__(_read_index(folder))
        elif (folder / SINGLE_FILE).is_file():
            super().__init__(_map(folder / SINGLE_FILE))
        else:
            raise CheckpointError(_no_weights(folder))


def _read_index(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX_FILE
    weight_map = section(read_json(path), "weight_map", str(path))
    if weight_map is None:
        raise CheckpointError(f"{path}: has no weight_map. Download it again.")
    for tensor in weight_map:
        string(weight_map, tensor, "", f"{path}: weight_map")
    files = sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in files:
        raise CheckpointError(
            f"{folder}: holds both {SINGLE_FILE} and an index of other files. Delete the set that is stale."
        )
    found: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: points to {name!r}, not a safetensors file inside the folder. Refused.")
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{path}: names {name}, which is not there. Download the folder again.")
        for tensor, values in _map(file).items():
            if tensor in found:
                raise CheckpointError(f"{folder}: {tensor} lies in both {weight_map[tensor]} and {name}. Delete one.")
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{file}: holds {tensor}, which the index expects in {weight_map.get(tensor)}. "
                    "Files of different downloads are mixed: download the folder again."
                )
            found[tensor] = values
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise CheckpointError(f"{path}: names {missing[0]}, which {weight_map[missing[0]]} does not hold.")
    return found


def _map(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; nothing of them is read. Of two tensors of one name the library would take the last, so
    the header is parsed here, too."""
    try:
        with safe_open(path, framework="pt") as file:
            with path.open("rb") as stream:
                header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")).decode())
            codes = {name: one["dtype"] for name, one in header.items() if name != "__metadata__"}
            for name, code in codes.items():
                if code not in CODES:
                    raise CheckpointError(
                        f"{path}: {name} has type {code}, which is not supported (quantised weights must be "
                        f"dequantised first). Supported: {', '.join(CODES)}."
                    )
            return {name: file.get_tensor(name) for name in codes}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        said = shown(str(error).removeprefix("Error while deserializing header: "))
        raise CheckpointError(
            f"{path}: damaged, truncated or no safetensors file ({said}). Download it again."
        ) from None


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
