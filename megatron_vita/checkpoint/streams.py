"""Threads and whole reads: what streaming through bounded memory is made of.

Reading, hashing and writing free Python's lock, so threads share the work and need no copies between processes.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from tqdm import tqdm

from megatron_vita.errors import CheckpointError, DamagedError
from megatron_vita.files import new_digest, usable_cores

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


def byte_bar(total: int, *, show: bool) -> tqdm[NoReturn]:
    """A bar on standard error with rate and time left, to be told the bytes that are done."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=not show, mininterval=0.5)


def unreadable(path: Path, error: OSError, at: str = "") -> CheckpointError:
    """The error of a file that is gone or that the disk cannot give: damage. Not so where the system refuses, for lack
    of a permission, of descriptors or of memory: then the file may be whole."""
    damaged = error.errno in (errno.ENOENT, errno.EIO, errno.EUCLEAN)
    return (DamagedError if damaged else CheckpointError)(f"{path}: cannot be read{at} ({error.strerror}).")


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A file's descriptor, to read from. Raises CheckpointError: it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise unreadable(path, error) from None
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
            raise unreadable(where, error, f" at byte {position}") from None
        if not got:
            raise DamagedError(f"{where}: ends at byte {position}, before what was promised. Copy it again.")
        view, position = view[got:], position + got


def digest_of(path: Path, position: int, length: int) -> str:
    """Digest of a part of a file, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    digest, block = new_digest(), memoryview(bytearray(min(length, BLOCK_BYTES)))
    with reading(path) as descriptor:
        for start in range(0, length, BLOCK_BYTES):
            part = block[: length - start]
            read_exactly(descriptor, part, position + start, path)
            digest.update(part)
    return digest.hexdigest()
