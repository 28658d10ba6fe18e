"""Durable files and their helpers: sync, atomic replacement, locks, digests, human-readable sizes.

Whatever Linux has and macOS lacks is asked for here alone, each with its fallback.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import xxhash

BLOCK_BYTES = 1 << 20
"""Bytes of a file that are read or written and hashed at once: few enough to stay in a core's cache between the two."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def no_room(error: BaseException) -> bool:
    """Whether a write failed for lack of space: disk full, quota or file size exceeded, file system now read-only."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def exhausted(error: BaseException) -> bool:
    """Whether reading failed for lack of file descriptors or memory, which is no fault of the file."""
    return isinstance(error, OSError) and error.errno in _EXHAUSTED


def readable_size(count: int) -> str:
    """Human-readable size in decimal units, as `df -H` prints it: 1.5 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 1000)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def usable_cores() -> int:
    """Number of cores that this process may use; on macOS, which does not report them, all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, in whatever way; no effect on macOS."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- what the disk has ----


def release_memory() -> None:
    """Give the system back what the C library keeps of freed memory, where it can be asked to (glibc)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def sync(path: Path) -> None:
    """Flush a file's content to disk; of a folder its entries, so that a power cut leaves no name without its file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_data(descriptor: int) -> None:
    """Flush an open file's content to disk, without its timestamps where the system supports that."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at a position of a file. (`os.pwrite` may write less: 2 GiB at most, or what still fits.)

    Raises:
        OSError: no space.
    """
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False, partial: Path | None = None) -> None:
    """Replace a file's content atomically: a reader finds the old content or the new one, also after a kill.

    Args:
        path: the file.
        content: text is written as UTF-8.
        durable: return only when content and name are on the disk.
        partial: where it is written first, on the same file system; by default beside the file.
    """
    partial = partial or path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    if durable:
        sync(partial)
    os.replace(partial, path)
    if durable:
        sync(path.parent)


def free_name(path: Path) -> Path:
    """`path`, or the first of path.2, path.3, ... that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


# ---- locks ----


def lock(stream: IO[Any], *, wait: bool = False) -> bool:
    """Hold an open file for this process alone, until it is closed or the process ends.

    Args:
        stream: opened by its name; a lock file is opened for writing.
        wait: until whoever holds it lets go of it.

    Returns:
        Whether it is held: not if another process holds it, or has just finished and deleted it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(stream.name))
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, made if it is not there. Yields what `lock` returns; raises OSError as it does."""
    with path.open("ab") as stream:
        yield lock(stream, wait=wait)


def lock_process(stream: IO[Any]) -> bool:
    """Hold an open file for this process alone, until it ends, however it ends.

    Unlike that of `lock`, this lock (POSIX record lock) also holds between machines on NFS, and no child process
    inherits it, whose life would prolong it. It is lost as soon as the process closes any descriptor of the file.

    Args:
        stream: opened for writing.

    Returns:
        Whether it is held: not if another process holds it.

    Raises:
        OSError: the file system has no locks (see `no_locks`).
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def no_locks(error: OSError) -> bool:
    """Whether taking a lock failed because the file system has none."""
    return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


# ---- digests ----


class Digest(Protocol):
    """Interface of the digests of hashlib and xxhash."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far, in hexadecimal."""


XXH3 = "xxh3_128"
"""Detects damage, at 29 GB/s per core (a copy: 4 GB/s; SHA-256 with hardware instructions: 2.0 GB/s). Not secure
against forgery, nor is any digest that lies beside its data."""
SHA256 = "sha256"
"""Identifies content: collision-resistant."""
_ALGORITHMS: dict[str, Callable[[], Digest]] = {SHA256: hashlib.sha256, XXH3: xxhash.xxh3_128}


def new_digest(algorithm: str = XXH3) -> Digest:
    """An empty digest: XXH3 or SHA256."""
    return _ALGORITHMS[algorithm]()


def file_info(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, as a manifest holds them. Raises OSError: it cannot be read."""
    digest = new_digest(SHA256)
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        _feed(digest, stream, size, memoryview(bytearray(BLOCK_BYTES)), path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _feed(digest: Digest, stream: IO[bytes], count: int, buffer: memoryview, path: Path) -> None:
    """Hash the next `count` bytes of a file. Raises OSError if there are fewer."""
    while count:
        got: int = stream.readinto(buffer[: min(len(buffer), count)])  # type: ignore[attr-defined]
        if not got:
            raise OSError(f"{path} ends at byte {stream.tell()}, {count} bytes early")
        digest.update(buffer[:got])
        count -= got


class FollowingDigests:
    """SHA-256 of files that other processes are still writing: each block is hashed while it is still in memory.

    One thread a file hashes it from its beginning up to where it is known to be final. (hashlib frees the GIL.)
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._changed = threading.Condition()
        self._limits = dict.fromkeys(files, 0)
        self._digests = {name: new_digest(SHA256) for name in files}
        self._stop = self._abandoned = False
        self._failure: OSError | None = None
        self._threads = [
            threading.Thread(target=self._follow, args=(name, path), name=f"sha256 {name}", daemon=True)
            for name, path in files.items()
        ]

    def __enter__(self) -> FollowingDigests:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned = kind is not None
        self._end()

    def advance(self, name: str, limit: int) -> None:
        """The first `limit` bytes of a file are final."""
        with self._changed:
            self._limits[name] = max(self._limits[name], limit)
            self._changed.notify_all()

    def result(self) -> dict[str, dict[str, int | str]]:
        """Bytes and SHA-256 of each file as far as it is final, as the manifest holds them.

        Raises:
            OSError: a file cannot be read, or is shorter than it was said to be.
        """
        self._end()
        if self._failure is not None:
            raise self._failure
        return {name: {"bytes": self._limits[name], "sha256": one.hexdigest()} for name, one in self._digests.items()}

    def _end(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _follow(self, name: str, path: Path) -> None:
        done = 0
        buffer = memoryview(bytearray(BLOCK_BYTES))
        try:
            with path.open("rb", buffering=0) as stream:
                while True:
                    with self._changed:
                        while self._limits[name] == done and not self._stop:
                            self._changed.wait()
                        limit = self._limits[name]
                    if limit == done or self._abandoned:
                        return
                    while done < limit and not self._abandoned:
                        step = min(BLOCK_BYTES, limit - done)
                        _feed(self._digests[name], stream, step, buffer, path)
                        done += step
        except OSError as error:
            self._failure = error
