"""Writing a checkpoint through torch.distributed.checkpoint: our planner and our storage writer.

A checkpoint is a set of tensors by key, each cut into boxes; a rank writes the boxes that it is told to (holdings.py).
The format is torch's own, `.metadata` and `__RANK_N.distcp`. What is ours: large boxes are cut into pieces, so that a
reader of a part need not read it all; each piece is hashed as it is written; and values that are not finite stop the
save. One process without process groups writes in the same way (offline.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_vita.checkpoint.integrity import PieceDigests
from megatron_vita.checkpoint.parts import as_checkpoint_errors
from megatron_vita.checkpoint.planner import PARTS, Planner
from megatron_vita.checkpoint.streams import Workers
from megatron_vita.checkpoint.tensors import bytes_of
from megatron_vita.errors import CheckpointError
from megatron_vita.files import BLOCK_BYTES, new_digest

FILE_BYTES = 4 << 30
"""A rank begins another file after so many bytes."""
_LITTLE_BYTES = 64 << 10
"""What torch.save writes besides the elements comes in many parts of some bytes."""
COMMON_FILE = "common.json"
"""Plain numbers: those of the optimizer and the schedule."""


@dataclass(frozen=True)
class WrittenPiece(WriteResult):
    """What a rank tells rank 0 about one piece."""

    digest: str
    """Of its bytes in the file (files.XXH3)."""


class Writer(FileSystemWriter):
    """Writes this process's pieces, one torch.save after the other, into a staging folder."""

    def __init__(
        self,
        staging: Path,
        start: Callable[[], object],
        publish: Callable[[PieceDigests], object],
        *,
        stage: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
        workers: int = 1,
        file_bytes: int = FILE_BYTES,
        durable: bool = True,
        finite: bool = True,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Prepare to write.

        Args:
            staging: the folder.
            start: makes it; called on rank 0 before any rank writes.
            publish: gives the finished folder its name; called on rank 0 when every rank's files are on the disk.
            stage: copies the state dict of an asynchronous save.
            workers: files that are written at once.
            durable: wait until the disk has each file.
            finite: refuse values that are not.
            advance: is told the bytes of each piece.
        """
        super().__init__(staging, sync_files=durable)
        self._staging = staging
        self._start, self._publish, self._stage = start, publish, stage
        self._workers, self._file_bytes = workers, file_bytes
        self._durable, self._finite = durable, finite
        self._advance = advance

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._start()

    def stage(self, state_dict: Any) -> Any:
        return {PARTS: self._stage(state_dict[PARTS])}

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False  # `stage` has waited

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # rank 0 makes the folder

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no random identity, no path of this machine: equal tensors are equal bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files = list(self._files(plan.items))
        prefix = plan.storage_data.prefix
        with _without_crc(), Workers(self._workers) as pool:
            written = pool.map(
                lambda one: self._write_file(f"{prefix}{one[0]}.distcp", one[1], planner), enumerate(files)
            )
            done: Future[list[WriteResult]] = Future()
            done.set_result([piece for pieces in written for piece in pieces])
        return done

    def _files(self, items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
        batch: list[WriteItem] = []
        size = 0
        for item in items:
            if size >= self._file_bytes:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += item.tensor_storage_size() or 0
        if batch:
            yield batch

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        written: list[WriteResult] = []
        path, position = self._staging / name, 0
        try:
            with path.open("wb", buffering=0) as file:
                for item in items:
                    data = cast(Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
                    if self._finite:
                        _check_finite(item.index.fqn, data)
                    sink = _Sink(file.fileno())
                    sink.save(_without_neighbours(data))
                    place = _StorageInfo(name, position, sink.size)
                    written.append(WrittenPiece(item.index, sink.size, place, sink.digest.hexdigest()))
                    position += sink.size
                    self._advance(data.nbytes)
                if self._durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror or error}). Make room, or choose another folder."
            ) from None
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        digests: dict[str, list[tuple[int, str]]] = {}
        for one in itertools.chain.from_iterable(results):
            assert isinstance(one, WrittenPiece)
            digests.setdefault(one.storage_data.relative_path, []).append((one.size_in_bytes, one.digest))
        common, metadata.planner_data = metadata.planner_data, None
        try:
            (self._staging / COMMON_FILE).write_text(json.dumps(common) + "\n", encoding="utf-8")
            super().finish(metadata, results)
            self._publish(digests)
        except OSError as error:
            where = error.filename2 or error.filename or self._staging  # of two, the second is the copy
            raise CheckpointError(
                f"{where}: could not be written ({error.strerror or error}). Nothing was published. Make room, or "
                "choose another folder."
            ) from None


class _Sink:
    """A file to torch.save, which hashes what it is given and writes it in few calls."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = bytearray()
        self._error: OSError | None = None
        self.size = 0
        self.digest = new_digest()

    def save(self, data: Tensor) -> None:
        """Write what torch.save makes of a tensor. Raises OSError."""
        try:
            torch.save(data, cast(Any, self))
            self._write(b"")
        except Exception:
            if self._error is not None:  # torch may have made another error of it
                raise self._error from None
            raise

    def write(self, data: bytes | memoryview) -> int:
        """Take all of it: the elements as they lie in memory, what is little with what follows."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if len(view) < _LITTLE_BYTES:
            self._held += view
        else:
            self._write(view)
        return len(view)

    def _write(self, view: bytes | memoryview) -> None:
        for one in (memoryview(self._held), memoryview(view)):
            for start in range(0, len(one), BLOCK_BYTES):
                block = one[start : start + BLOCK_BYTES]
                self.digest.update(block)
                try:
                    while block:
                        block = block[os.write(self._descriptor, block) :]
                except OSError as error:
                    self._error = self._error or error
                    raise
        self._held = bytearray()

    def flush(self) -> None:
        """`save` does."""


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Let torch.save leave out its CRC-32, which takes longer than all else and finds less than our digests."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _without_neighbours(data: Tensor) -> Tensor:
    """The same elements, not copied, as all of a storage: of a view torch.save would write the whole storage."""
    if not data.numel():
        return torch.empty(data.shape, dtype=data.dtype)
    return torch.from_numpy(bytes_of(data).numpy()).view(data.dtype).view(data.shape)


def _check_finite(key: str, data: Tensor) -> None:
    """Refuse a NaN or an infinity. Smallest and largest are found in one pass, and are NaN where any element is."""
    if data.is_floating_point() and data.numel():
        low, high = torch.aminmax(data)
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(
                f"{key} holds values that are not finite: no checkpoint of them is written. The checkpoints before are "
                "whole; go on from the last one with a lower optimizer.lr."
            )


def write(
    planner: Planner,
    writer: Writer,
    state: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> None:
    """Write a checkpoint. All ranks of the group (by default the world) call it, or one process `alone`.

    Raises:
        CheckpointError: on every rank, if any rank failed; nothing has been published then.
    """
    with as_checkpoint_errors():
        save({PARTS: dict(state)}, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
