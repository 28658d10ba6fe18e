"""Threads, buffers and whole reads and writes: what streaming through bounded memory is made of.

Reading, hashing and writing free Python's lock, so threads share the work and need no copies between processes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vita.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Bytes that are read, hashed and written at once: little enough to stay in a processor's cache between the three."""
MAX_WORKERS = 8
"""More threads than this wait for memory rather than work."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def default_workers() -> int:
    """As many threads as this process may use cores, up to MAX_WORKERS."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


class Workers:
    """A pool of threads that hands results back in order, and the buffers they reuse.

    torch's own threads are held back meanwhile: each of ours would start a team of them.
    """

    def __init__(self, count: int) -> None:
        self._window = 2 * count
        self._pool = ThreadPoolExecutor(count)
        self._buffers: deque[Tensor] = deque()
        self._torch_threads = torch.get_num_threads()

    def map(self, act: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Results in the items' order. At most two items a thread are begun ahead of the one that is handed out."""
        pending: deque[Future[_Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(act, item))
                if len(pending) >= self._window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for one in pending:
                one.cancel()

    def take(self, size: int) -> Tensor:
        """A uint8 buffer of at least `size` bytes, to be given back: a fresh one costs a page fault every 4 KiB."""
        try:
            held = self._buffers.pop()
        except IndexError:
            held = torch.empty(0, dtype=torch.uint8)
        return held if held.numel() >= size else torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer that was taken. One of unusual size is not kept."""
        if buffer.numel() <= 4 * BLOCK_BYTES:
            self._buffers.append(buffer)

    def __enter__(self) -> Workers:
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)


def shaped(buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The first bytes of a uint8 buffer as a tensor."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(tuple(shape))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_exactly(descriptor: int, view: memoryview, position: int, where: Path) -> None:
    """Fill `view` from a file.

    Raises:
        CheckpointError: the file ends before.
    """
    while view:
        got = os.preadv(descriptor, [view], position)
        if not got:
            raise CheckpointError(f"{where}: ends at byte {position}, before what was promised. Copy it again.")
        view, position = view[got:], position + got


def write_exactly(descriptor: int, parts: Sequence[bytes | memoryview], position: int) -> None:
    """Write parts one after the other at a place in a file. Raises OSError (no space) if not all could be written."""
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        done = os.pwritev(descriptor, left, position)
        position += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left and done:
            left[0] = left[0][done:]


def sha256_of(path: Path, position: int, length: int) -> str:
    """SHA-256 of a part of a file.

    Raises:
        CheckpointError: the file ends before.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(min(length, BLOCK_BYTES)))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start in range(0, length, BLOCK_BYTES):
            part = block[: length - start]
            read_exactly(descriptor, part, position + start, path)
            digest.update(part)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
