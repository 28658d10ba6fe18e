"""Threads, buffers and whole reads and writes: what streaming through bounded memory is made of.

Reading, hashing and writing free Python's lock, so threads share the work and need no copies between processes.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_vita.checkpoint.dtypes import Bits, DType
from megatron_vita.errors import CheckpointError
from megatron_vita.files import XXH3, new_digest, usable_cores

Bytes = NDArray[np.uint8]
"""One-dimensional memory."""
BLOCK_BYTES = 8 << 20
"""Bytes that are read, hashed and written at once: little enough to stay in a processor's caches between the three."""
MAX_WORKERS = 8
"""More threads than this wait for memory rather than work."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def default_workers() -> int:
    """One thread more than this process may use cores, since one mostly waits for its turn to write; at most
    MAX_WORKERS."""
    return min(MAX_WORKERS, usable_cores() + 1)


class Workers:
    """A pool of threads that hands results back in order."""

    def __init__(self, count: int) -> None:
        """Args: count: of threads. Beyond MAX_WORKERS it is not followed: each holds memory."""
        count = min(count, MAX_WORKERS)
        self._window = 2 * count
        self._pool = ThreadPoolExecutor(count)

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
            wait(pending)  # what still runs may use what the caller is about to close

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


FILES_AT_ONCE = 2
"""Files that are written side by side: the system lets one thread at a time write into each."""


def in_turn(sources: Iterable[Iterable[_Item]], count: int = FILES_AT_ONCE) -> Iterator[_Item]:
    """The items of several sources in turn, of `count` sources at a time and of each in its own order."""
    waiting = iter(sources)
    active = deque(iter(one) for one in itertools.islice(waiting, count))
    while active:
        source = active.popleft()
        for item in source:
            active.append(source)
            yield item
            break
        else:
            active.extend(iter(one) for one in itertools.islice(waiting, 1))


class Buffers:
    """Memory that is used again: what is fresh from the system costs a page fault every 4 KiB."""

    def __init__(self, most: int) -> None:
        """Args: most: bytes that are kept at most; what is given back beyond them is let go."""
        self._most = most
        self._lock = threading.Lock()
        self._free: list[Bytes] = []

    def take(self, size: int) -> Bytes:
        """At least `size` bytes, to be given back."""
        with self._lock:
            for index in reversed(range(len(self._free))):  # the last one given may still be in a cache
                if len(self._free[index]) >= size:
                    return self._free.pop(index)
        return np.empty(max(size, BLOCK_BYTES), np.uint8)

    def give(self, buffer: Bytes) -> None:
        """Return what was taken, once nobody looks into it any more."""
        with self._lock:
            if sum(map(len, self._free)) + len(buffer) <= self._most:
                self._free.append(buffer)


def byte_bar(total: int, *, show: bool) -> tqdm[NoReturn]:
    """A bar on standard error with rate and time left, to be told the bytes that are done."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=not show, mininterval=0.5)


def shaped(buffer: Bytes, shape: Sequence[int], dtype: DType) -> Bits:
    """The first bytes of a buffer as the bits of a tensor."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype.bits).reshape(tuple(shape))


def raw(bits: Bits) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return bits.reshape(-1).view(np.uint8).data


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A file's descriptor, to read from. Raises CheckpointError: it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, view: memoryview, position: int, where: Path) -> None:
    """Fill `view` from a file.

    Raises:
        CheckpointError: the file ends before, or the disk gives an error: no writer is to take it for its own.
    """
    while view:
        try:
            got = os.preadv(descriptor, [view], position)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read at byte {position} ({error.strerror}).") from None
        if not got:
            raise CheckpointError(f"{where}: ends at byte {position}, before what was promised. Copy it again.")
        view, position = view[got:], position + got


class OutputFile:
    """A new file that several threads write, each at its place.

    The system lets one thread at a time write into a file, and those who wait keep their cores busy with asking. Here
    they sleep, and the other threads read and hash meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._turn = threading.Lock()

    def write(self, parts: Sequence[bytes | memoryview], position: int) -> None:
        """Write parts one after the other. Raises OSError (no space) if not all could be written."""
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        with self._turn:
            while left:
                # -1 once it is closed: the number may be another file's by then
                done = os.pwritev(self._descriptor, left, position)
                position += done
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if left and done:
                    left[0] = left[0][done:]

    def sync(self) -> None:
        """Wait until the content is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; it takes nothing afterwards. Closing it once more does nothing."""
        with self._turn:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def digest_of(path: Path, position: int, length: int, algorithm: str = XXH3) -> str:
    """Digest of a part of a file, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    digest, block = new_digest(algorithm), memoryview(bytearray(min(length, BLOCK_BYTES)))
    with reading(path) as descriptor:
        for start in range(0, length, BLOCK_BYTES):
            part = block[: length - start]
            read_exactly(descriptor, part, position + start, path)
            digest.update(part)
    return digest.hexdigest()
