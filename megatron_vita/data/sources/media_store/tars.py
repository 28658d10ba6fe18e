"""Tar archives: lists members with the offsets of their data."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_vita.data.sources.media_store.members import HOSTILE_NAME, LINK, NO_FILE, TAR, Member, clean_name
from megatron_vita.errors import ConfigError

BLOCK = tarfile.BLOCKSIZE
_MOST_HEADER = 1 << 20
"""Bytes of a long name or a set of extended attributes; a hostile header says gigabytes, and tarfile believes it."""


class _Careful:
    """A file whose reads are limited to the largest valid header."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read
        self.name, self.mode = "archive", "rb"

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def is_tar(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a tar. (An empty tar is all zeros.)"""
    if len(head) < BLOCK:
        return False
    if not any(head[:BLOCK]):
        return len(head) >= 2 * BLOCK and not any(head[: 2 * BLOCK])
    try:
        return bool(tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape").name)
    except tarfile.HeaderError:
        return False


def tar_members(path: Path) -> Iterator[Member]:
    """Every file of a tar, in file order; folders are none.

    Raises:
        ConfigError: it is cut short or damaged.
    """
    with path.open("rb") as stream:
        yield from walk(path, stream)


def walk(path: Path, stream: BinaryIO, stop: int | None = None) -> Iterator[Member]:
    """Members from the position of a stream on.

    Args:
        path: for messages.
        stream: the tar, at the header of a member.
        stop: offset at which to stop; none: the archive's end.
    """
    try:
        tar = tarfile.TarFile(fileobj=_Careful(stream), errorlevel=0)  # type: ignore[arg-type]
        while (info := tar.next()) is not None and (stop is None or info.offset < stop):
            if info.size < 0:  # tarfile would go back by that much, for ever
                raise tarfile.ReadError("a member of negative size")
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if not info.isdir():
                yield _member(info)
        if stop is not None:
            return
        # a damaged header looks to tarfile like the end
        stream.seek(tar.offset)
        rest = stream.read(BLOCK)
    except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: the tar is cut short or damaged ({error}). Fetch it again.") from None
    if rest.strip(b"\0") or 0 < len(rest) < BLOCK:
        raise ConfigError(f"{path}: the tar is cut short or damaged at byte {tar.offset}. Fetch it again.")


def _member(info: tarfile.TarInfo) -> Member:
    name, clean = clean_name(info.name)
    kind = TAR
    if not clean:
        kind = HOSTILE_NAME
    elif info.issym() or info.islnk():
        kind = LINK
    elif not info.isreg() or info.issparse():
        kind = NO_FILE
    return Member(name, kind, info.offset, info.offset_data, info.size, info.size, 0)
