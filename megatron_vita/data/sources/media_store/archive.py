"""Opens zip and tar archives for random access: compressed and split ones are first unpacked or joined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.data.sources.media_store.cache import build_once
from megatron_vita.data.sources.media_store.compressed import compression_of, parts_of, peek, unpack
from megatron_vita.data.sources.media_store.members import STORED, TAR, Member
from megatron_vita.data.sources.media_store.tars import BLOCK, is_tar, tar_members
from megatron_vita.data.sources.media_store.zips import inflate, is_zip, several_volumes, zip_members
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive with random access."""

    path: Path
    """As the user has it; the first part of a split one."""
    data: Path
    """The zip or tar itself: the same file, or what it was unpacked to."""
    zipped: bool
    """A zip; else a tar."""

    def members(self) -> Iterator[Member]:
        """Every file in it, rejected ones included.

        Raises:
            ConfigError: cut short, damaged, or of several volumes.
        """
        return zip_members(self.data) if self.zipped else tar_members(self.data)

    def content(self, member: Member, descriptor: int) -> Iterator[bytes]:
        """A member's bytes, block by block.

        Args:
            member: one that is not rejected.
            descriptor: of the opened `data`.

        Raises:
            DataError: damaged.
        """
        if member.kind == TAR:
            end = member.offset + member.size
            return (os.pread(descriptor, min(1 << 20, end - at), at) for at in range(member.offset, end, 1 << 20))
        return inflate(descriptor, member.header, member.size, member.crc, stored=member.kind == STORED)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not, by its content."""
    head = peek(path, 2 * BLOCK)
    return is_zip(head) or (is_tar(head) and any(head))


def open_archive(path: Path, work: Path | None = None, *, progress: bool = True) -> Archive:
    """An archive, after unpacking it into the work folder (once) where it has no random access.

    Raises:
        ConfigError: no archive, or one that cannot be used.
        DataError: the packed data is damaged.
    """
    if path.with_suffix(".z01").exists():
        raise several_volumes(path)
    parts = parts_of(path)
    head = peek(path, 2 * BLOCK)
    zipped = is_zip(head) or path.suffix.lower() == ".zip"  # a zip may have a program before it
    if not (zipped or is_tar(head)):
        raise ConfigError(f"{path}: neither a zip nor a tar, or a damaged one. Fetch it again.")
    with parts[0].open("rb") as stream:
        packed = compression_of(stream.read(64)) is not None
    data = path
    if packed or len(parts) > 1:
        data = build_once(work, "unpacked", parts, lambda target: unpack(path, target, progress=progress))
    return Archive(path, data, zipped)
