"""Write folders of safetensors block by block; the bytes do not depend on the number of threads.

The safetensors library writes a file from whole tensors in memory, so files are written here: 8 bytes length (little
endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, data.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, extent, runs, volume, whole
from megatron_vita.checkpoint.streams import Workers
from megatron_vita.checkpoint.tensors import LazyTensors
from megatron_vita.convert.hf_config import write_json
from megatron_vita.convert.safetensors_folder import INDEX_FILE, SINGLE_FILE
from megatron_vita.convert.values import CODES, type_name
from megatron_vita.errors import CheckpointError
from megatron_vita.files import BLOCK_BYTES, new_digest

MAX_SHARD_BYTES = 2 * 10**9
"""Files are loaded side by side: several small ones are better than one large one."""
_BLOCK_BYTES = 8 << 20
"""Bytes that are read at once."""
_MOST_READERS = 4
"""Threads that read: one writes, and more of them would only hold memory."""
_CODES = {dtype: code for code, dtype in CODES.items()}


@dataclass(frozen=True)
class PlannedFile:
    """One file: its header, and its tensors in order."""

    name: str
    tensors: tuple[str, ...]
    header: bytes
    data_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


def plan_shards(tensors: LazyTensors, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[PlannedFile]:
    """One file, or as many as it takes for none to hold more tensor data than `max_shard_bytes`, in the tensors' order.
    A tensor that is larger has a file of its own. Raises CheckpointError: a tensor has a type that safetensors cannot
    hold."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = tensors.nbytes(name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return [_plan(SINGLE_FILE, tensors, shards[0])]
    return [
        _plan(f"model-{number:05d}-of-{len(shards):05d}.safetensors", tensors, names)
        for number, names in enumerate(shards, 1)
    ]


def write_safetensors(
    folder: Path, tensors: LazyTensors, files: Sequence[PlannedFile], workers: int, advance: Callable[[int], object]
) -> dict[str, str]:
    """Write the planned files, and their index if they are several. Threads read ahead; this one hashes and writes.
    Raises OSError: no space; CheckpointError: the tensors cannot be read.

    Args:
        advance: called with the number of bytes written.

    Returns:
        Digest of each file of weights.
    """

    free: SimpleQueue[Tensor] = SimpleQueue()  # memory that is used again: fresh pages cost more than a copy

    def read(block: tuple[str, Slices]) -> tuple[Tensor, int]:
        name, slices = block
        dtype = tensors.dtype(name)
        size = volume(slices) * dtype.itemsize
        try:
            memory = free.get_nowait()
        except Empty:
            memory = torch.empty(0, dtype=torch.uint8)
        if memory.nbytes < size:
            memory = torch.empty(max(size, _BLOCK_BYTES), dtype=torch.uint8)
        tensors.read_into(name, slices, memory[:size].view(dtype).view(extent(slices)))
        return memory, size

    def blocks() -> Iterator[tuple[str, Slices]]:
        for name in itertools.chain.from_iterable(one.tensors for one in files):
            if tensors.nbytes(name):
                for slices in runs(whole(tensors.shape(name)), tensors.dtype(name).itemsize, _BLOCK_BYTES):
                    yield name, slices

    digests: dict[str, str] = {}
    with Workers(min(workers, _MOST_READERS)) as pool:
        parts = pool.map(read, blocks())
        for planned in files:
            digest, left = new_digest(), planned.data_bytes
            with (folder / planned.name).open("wb") as file:
                file.write(planned.header)
                digest.update(planned.header)
                while left:
                    memory, size = next(parts)
                    for start in range(0, size, BLOCK_BYTES):
                        part = memory[start : min(size, start + BLOCK_BYTES)].numpy().data
                        digest.update(part)
                        file.write(part)
                    free.put(memory)
                    advance(size)
                    left -= size
            digests[planned.name] = digest.hexdigest()
    if files[0].name != SINGLE_FILE:
        weight_map = {name: one.name for one in files for name in one.tensors}
        index = {"metadata": {"total_size": sum(one.data_bytes for one in files)}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
    return digests


def _plan(file: str, tensors: LazyTensors, names: Sequence[str]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        size, dtype = tensors.nbytes(name), tensors.dtype(name)
        if dtype not in _CODES:
            raise CheckpointError(f"{name}: {type_name(dtype)} cannot be exported. Convert it first.")
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(tensors.shape(name)),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of eight, as other writers have it
    return PlannedFile(file, tuple(names), len(text).to_bytes(8, "little") + text, offset)
