"""The bytes of a checkpoint: torch's distributed-checkpoint layout, written piece by piece. (Reading: stored.py.)

A rank writes the parts of tensors it is answerable for into `__RANK_0.distcp`, one torch.save after the other; the file
`.metadata` says which part of which tensor lies where. This is what megatron-core's `torch_dist` format is, and its own
loader reads it. megatron-core's writer is not used, because it starts a helper process (2 to 5 s a rank, and it
outlives a killed rank) to write asynchronously; ours writes in the calling thread and hashes each piece as it passes.
torch's formats are spoken without torch (archive.py, metadata.py), which takes longer to import than to convert with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vita.checkpoint.archive import frame
from megatron_vita.checkpoint.dtypes import DType, bits_of, dtype_of
from megatron_vita.checkpoint.lazy import extent, fills, runs, slice_of, slices_at, whole
from megatron_vita.checkpoint.metadata import StoredPiece, StoredTensor, metadata_bytes
from megatron_vita.checkpoint.streams import OutputFile, raw
from megatron_vita.errors import CheckpointError
from megatron_vita.files import new_digest

if TYPE_CHECKING:
    from torch import Tensor

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
"""megatron-core's marker of a distributed checkpoint."""
PIECE_BYTES = 16 << 20
"""Large tensors are written in runs of rows of about this size, so that a reader of a part need not read it all."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class WrittenPiece:
    """One part of one tensor as it was written."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: DType
    file: str
    position: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""
    digest: str
    """Digest of these bytes (files.XXH3)."""


@dataclass(frozen=True)
class WrittenSlice:
    """One part of one tensor that is to be written."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


def write_pieces(folder: Path, file_name: str, pieces: Iterable[WrittenSlice]) -> list[WrittenPiece]:
    """Write pieces one after the other into one file, each read from the iterable only when its turn comes, and cut
    into smaller ones where it is large.

    Args:
        pieces: tensors on any device, in any layout; empty ones and those without dimensions, too.

    Returns:
        What was written, in file order; empty, and no file, if there was nothing to write.

    Raises:
        CheckpointError: a tensor has a type that is not supported; named.
        OSError: no space.
    """
    written: list[WrittenPiece] = []
    with contextlib.ExitStack() as stack:
        file, position = None, 0
        for piece in pieces:
            if file is None:
                file = stack.enter_context(OutputFile(folder / file_name))
            try:
                dtype = dtype_of(piece.data)
            except CheckpointError as error:
                raise CheckpointError(f"{piece.key}: {error}") from None
            data = piece.data.detach().cpu().contiguous()
            for slices in runs(whole(data.shape), dtype.itemsize, PIECE_BYTES):
                head, tail = frame(extent(slices), dtype)
                parts: list[bytes | memoryview] = [head, raw(slice_of(bits_of(data), slices)), tail]
                digest = new_digest()
                for one in parts:
                    digest.update(one)
                file.write(parts, position)
                written.append(
                    WrittenPiece(
                        key=piece.key,
                        global_shape=tuple(piece.global_shape),
                        offsets=tuple(first + one.start for first, one in zip(piece.offsets, slices, strict=True)),
                        sizes=extent(slices),
                        dtype=dtype,
                        file=file_name,
                        position=position,
                        length=sum(map(len, parts)),
                        digest=digest.hexdigest(),
                    )
                )
                position += written[-1].length
        if file is not None:
            file.sync()
    return written


def write_metadata(folder: Path, pieces: Sequence[WrittenPiece]) -> None:
    """Write `.metadata` over the pieces of all ranks, once they are proved to make up every tensor exactly.

    Raises:
        CheckpointError: pieces of one tensor disagree about its shape or dtype, overlap, or leave a gap.
    """
    by_key: dict[str, list[WrittenPiece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    tensors: dict[str, StoredTensor] = {}
    for key, parts in by_key.items():
        first = parts[0]
        if any(one.global_shape != first.global_shape or one.dtype != first.dtype for one in parts):
            kinds = sorted({f"{tuple(one.global_shape)} {one.dtype}" for one in parts})
            raise CheckpointError(f"{key}: ranks disagree about its shape: {', '.join(kinds)}.")
        shards = [slices_at(one.offsets, one.sizes) for one in parts]
        if len({one.offsets for one in parts}) != len(parts) or not fills(shards, first.global_shape):
            raise CheckpointError(f"{key}: its parts do not hold each element of {first.global_shape} once.")
        stored = tuple(StoredPiece(one.offsets, one.sizes, one.file, one.position, one.length) for one in parts)
        tensors[key] = StoredTensor(first.global_shape, first.dtype, stored)
    (folder / METADATA_FILE).write_bytes(metadata_bytes(tensors))
    (folder / FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")
