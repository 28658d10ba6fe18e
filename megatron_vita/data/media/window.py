"""Random access to a medium: a file, a region of a file (a member of an archive), or bytes."""

from __future__ import annotations

import os

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.files import exhausted

HEAD = 4096
"""Bytes of a file that are read when it is opened: most picture headers, and one page."""


class Window:
    """`size` bytes beginning at `base` of an open file, or of some bytes. Use it as a context manager.

    Reads never leave the window; they come back shorter at its end, as a file's do.
    """

    __slots__ = ("_base", "_descriptor", "head", "size")

    def __init__(self, head: bytes, size: int, descriptor: int = -1, base: int = 0) -> None:
        self.head = head
        """The first bytes, all of them if the medium is in memory."""
        self.size = size
        """Bytes of the medium."""
        self._descriptor, self._base = descriptor, base

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, place: int, size: int) -> bytes:
        """`size` bytes from `place`; fewer where the window ends."""
        if place + size <= len(self.head) or self._descriptor < 0:
            return self.head[place : place + size]
        size = min(size, self.size - place)
        return os.pread(self._descriptor, size, self._base + place) if size > 0 else b""


def open_window(file: MediaFile) -> Window:
    """Open a medium for reading.

    Raises:
        DataError: media_missing, if it is not there, is no regular file, or its region lies beyond the file's end.
    """
    if file.data is not None:
        return Window(file.data, len(file.data))
    if file.path is None:
        raise reject("media_missing", "the record gives neither a path nor bytes.")
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except (OSError, ValueError) as error:
        if exhausted(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise reject("media_missing", f"{file.name} cannot be read ({reason}).") from None
    try:
        whole = os.fstat(descriptor).st_size
        size = whole - file.offset if file.size is None else file.size
        if file.offset < 0 or size < 0 or file.offset + size > whole:
            raise reject("media_missing", f"{file.name} ends beyond its archive. Fetch the archive again.")
        return Window(os.pread(descriptor, min(size, HEAD), file.offset), size, descriptor, file.offset)
    except OSError as error:
        os.close(descriptor)
        if exhausted(error):
            raise
        raise reject("media_missing", f"{file.name} cannot be read ({error.strerror}).") from None
    except BaseException:
        os.close(descriptor)
        raise
