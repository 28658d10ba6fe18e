"""Calls that change (or read) a folder, counted: at a chosen one the process is killed, or the call fails.

All ways by which Python changes a disk are watched: functions of `os`, and files opened for writing by `open`, whose
writes reach the disk when their buffer does. `Calls.written` is compared with the sizes of files in a test, so that
nothing goes by unseen. A write that is struck has written its first half.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

KILL = -1
"""In place of an error number: the process dies at once, as by kill -9."""

_BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate")
_BY_TWO_PATHS = ("rename", "replace", "link", "symlink")
_BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "posix_fallocate")
_WRITES = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range")
_READS = ("read", "pread", "readv", "preadv")
_REAL = {
    name: getattr(os, name)
    for name in ("open", *_BY_PATH, *_BY_TWO_PATHS, *_BY_DESCRIPTOR, *_WRITES, *_READS)
    if hasattr(os, name)
}
_REAL_OPEN = open
_GROWS = {"open", "mkdir", "posix_fallocate", "fsync", "fdatasync", *_WRITES, *_BY_TWO_PATHS}
"""Calls that fail on a full disk."""


@dataclass(frozen=True)
class Fault:
    """What happens at the call number `at`."""

    at: int
    """From 1."""
    error: int = KILL
    """errno of the failing call, or KILL."""
    lasting: bool = False
    """The later calls that need room fail too, as on a disk that stays full."""


@dataclass
class Calls:
    """The calls so far on whatever lies below one folder, in this process."""

    root: str
    fault: Fault | None = None
    reads: bool = False
    """Whether calls that read are counted, instead of those that write."""
    made: list[tuple[str, str]] = field(default_factory=list)
    """(function, path)."""
    written: int = 0
    """Bytes."""
    struck: str | None = None
    """The first call that the fault has hit."""
    _lock: Any = field(default_factory=threading.Lock)

    def counts(self, path: str, *, reads: bool = False) -> bool:
        """Whether a call is counted: its path is the watched folder or lies in it, and it does what is watched."""
        return reads == self.reads and (path == self.root or path.startswith(self.root + "/"))

    def call(self, name: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Count a call and do it, unless it is to fail.

        Args:
            half: does the first half of a write.
        """
        with self._lock:
            self.made.append((name, path))
            number, fault = len(self.made), self.fault
            hit = fault is not None and (number == fault.at or (fault.lasting and number > fault.at and name in _GROWS))
            if hit and self.struck is None:
                self.struck = f"{name} {path}"
        if hit:
            assert fault is not None
            if half is not None:
                half()
            if fault.error == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(fault.error, os.strerror(fault.error), path)
        result = act()
        if half is not None:
            with self._lock:
                self.written += result
        return result


def _path(file: Any, dir_fd: int | None = None) -> str:
    """Absolute path of a name or an open file."""
    if isinstance(file, int):
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return ""
    name = os.fsdecode(file)
    folder = os.getcwd() if dir_fd is None else _path(dir_fd)
    return os.path.normpath(os.path.join(folder, name))


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    calls: Calls

    def read(self, size: int | None = -1, /) -> bytes:
        real = super().read
        return self._reading(lambda: real(size))

    def readall(self) -> bytes:
        return self._reading(super().readall)

    def readinto(self, buffer: Any, /) -> int:
        real = super().readinto
        return self._reading(lambda: real(buffer))

    def _reading(self, act: Callable[[], Any]) -> Any:
        path = _path(self.fileno())
        return self.calls.call("read", path, act) if self.calls.counts(path, reads=True) else act()

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        real = super().write
        if self.calls.reads:
            return real(view)
        return self.calls.call("write", _path(self.fileno()), lambda: real(view), lambda: real(view[: len(view) // 2]))

    def truncate(self, size: int | None = None, /) -> int:
        real = super().truncate
        if self.calls.reads:
            return real(size)
        return self.calls.call("ftruncate", _path(self.fileno()), lambda: real(size))


def _halves(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a write that writes half as much."""
    if name in ("writev", "pwritev"):
        joined = memoryview(b"".join(arguments[1]))
        return (arguments[0], [joined[: len(joined) // 2]], *arguments[2:])
    if name == "sendfile":
        return (*arguments[:3], min(arguments[3], os.fstat(arguments[1]).st_size) // 2)
    if name == "copy_file_range":
        return (*arguments[:2], arguments[2] // 2, *arguments[3:])
    view = memoryview(arguments[1]).cast("B")
    return (arguments[0], view[: len(view) // 2], *arguments[2:])


def _hooks(calls: Calls) -> Iterator[tuple[str, Callable[..., Any]]]:
    def by_path(name: str) -> Callable[..., Any]:
        def hooked(path: Any, *args: Any, **kwargs: Any) -> Any:
            where = _path(path, kwargs.get("dir_fd"))
            act = lambda: _REAL[name](path, *args, **kwargs)  # noqa: E731
            return calls.call(name, where, act) if calls.counts(where) else act()

        return hooked

    def by_two_paths(name: str) -> Callable[..., Any]:
        def hooked(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            where = _path(target, kwargs.get("dst_dir_fd"))
            act = lambda: _REAL[name](source, target, *args, **kwargs)  # noqa: E731
            return calls.call(name, where, act) if calls.counts(where) else act()

        return hooked

    def by_descriptor(name: str) -> Callable[..., Any]:
        def hooked(file: Any, *args: Any) -> Any:
            where = _path(file if isinstance(file, int) else file.fileno())
            act = lambda: _REAL[name](file, *args)  # noqa: E731
            return calls.call(name, where, act) if calls.counts(where) else act()

        return hooked

    def reads(name: str) -> Callable[..., Any]:
        def hooked(file: int, *args: Any) -> Any:
            where = _path(file)
            act = lambda: _REAL[name](file, *args)  # noqa: E731
            return calls.call(name, where, act) if calls.counts(where, reads=True) else act()

        return hooked

    def writes(name: str) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            args = (*args, *kwargs.values())
            where = _path(args[1] if name == "copy_file_range" else args[0])
            act = lambda: _REAL[name](*args)  # noqa: E731
            if not calls.counts(where):
                return act()
            return calls.call(name, where, act, lambda: _REAL[name](*_halves(name, args)))

        return hooked

    def opens(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
        where = _path(path, kwargs.get("dir_fd"))
        act = lambda: _REAL["open"](path, flags, *args, **kwargs)  # noqa: E731
        writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return calls.call("open", where, act) if calls.counts(where, reads=not writing) else act()

    kinds = [(_BY_PATH, by_path), (_BY_TWO_PATHS, by_two_paths), (_BY_DESCRIPTOR, by_descriptor)]
    kinds += [(_WRITES, writes), (_READS, reads)]
    for names, hook in kinds:
        yield from ((name, hook(name)) for name in names if name in _REAL)
    yield "open", opens


def _opening(calls: Calls) -> Callable[..., Any]:
    def hooked(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        where = _path(file)
        writing = bool(set(mode) & set("wax+"))
        if not calls.counts(where, reads=not writing):
            return _REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = calls.call("open", where, lambda: _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener))
        raw.calls = calls
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writing else io.BufferedReader
        buffered = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    return hooked


@contextmanager
def watching(root: Path, fault: Fault | None = None, *, reads: bool = False) -> Iterator[Calls]:
    """Watch what this process, all its threads, writes (or reads) below a folder, and strike it with a fault."""
    calls = Calls(os.path.abspath(root), fault, reads)
    opened = _opening(calls)
    with (
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(io, "open", opened),
        mock.patch.multiple(os, **dict(_hooks(calls))),
    ):
        yield calls
