"""The zip of torch.save: its members found, each checked to lie plainly in the file, and the same made anew."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_vita.errors import CheckpointError

MAX_DIRECTORY = 32 << 20
"""Bytes of a zip's list of members: about 100 each, and a rank's file has some thousands. Python's reader reads the
list whole, and takes ten times its size in memory."""
NAMES_OF_TENSOR = 15728199511854643026
NAMES_OF_NO_TENSOR = 2908468677762923104
"""torch's hash of the names in the archive, one half of its serialization id. The id only tells archives apart."""
_ALIGNMENT = 64
_LARGE = (1 << 32) - 1
"""From here on a number has no room in a zip's usual fields."""
_UTF8, _DESCRIPTOR = 0x0800, 0x0008
"""Flags of a member: its name is UTF-8; its CRC-32 and sizes stand behind it, as torch has it unless it is empty."""


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Where a member's bytes lie."""

    start: int
    size: int


def read_directory(stream: IO[bytes], where: Path) -> dict[str, ZipMember]:
    """Members of the zip by name below its one folder: each uncompressed, and inside the file."""
    try:
        total = stream.seek(0, os.SEEK_END)
        members = {}
        for entry in zipfile.ZipFile(cast(IO[bytes], _Bounded(stream))).infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(f"{where}: {entry.filename[:80]} is compressed or encrypted. Refused.")
            stream.seek(entry.header_offset)
            head = struct.unpack("<4s5H3I2H", stream.read(30))
            start = entry.header_offset + 30 + head[9] + head[10]
            if head[0] != b"PK\x03\x04" or start + entry.file_size > total:
                raise CheckpointError(f"{where}: {entry.filename[:80]} leaves the file. Download it again.")
            name = entry.filename.partition("/")[2]
            if name in members:
                raise CheckpointError(f"{where}: {name[:80]} stands in it twice. Download it again.")
            members[name] = ZipMember(start, entry.file_size)
        return members
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(
            f"{where}: not a zip as torch.save writes since torch 1.6 ({error}). Download it again; a file of an older "
            "torch must be saved anew in a sandbox."
        ) from None


class _Bounded:
    """What Python's reader of zips needs of a stream, with a limit to what it may ask for at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(min(size, MAX_DIRECTORY + 1) if size >= 0 else MAX_DIRECTORY + 1)
        if len(content) > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of members has more than {MAX_DIRECTORY} bytes")
        return content


class View(io.RawIOBase):
    """A stream over bytes that are in memory, without the copy that BytesIO makes."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._view[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


class Zip:
    """A zip as torch's writer lays it out: each content aligned, its CRC-32 and sizes behind it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._at = 0
        self._directory: list[bytes] = []
        self._checksums = 0

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""
        start = self.begin(name, len(content))
        self._parts.append(content)
        self.end(name, start, len(content), zlib.crc32(content))

    def add_settings(self) -> None:
        """The members that say how the others are written."""
        self.add(".format_version", b"1")
        self.add(".storage_alignment", b"%d" % _ALIGNMENT)
        self.add("byteorder", b"little")

    def begin(self, name: str, size: int) -> int:
        """The header of a member, padded so that its content is aligned. Returns where the header begins."""
        start, path = self._at, _path(name)
        wide = _wide(size, 0, start)
        padding = -(start + 30 + len(path) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._append(struct.pack("<4s5H3I2H", b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(path), len(extra)))
        self._append(path + extra)
        return start

    def end(self, name: str, start: int, size: int, checksum: int) -> None:
        """What stands behind the content of a member, and its line in the directory."""
        self._at += size
        path, wide = _path(name), _wide(size, size, start)
        if size:
            self._append(struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", checksum, size, size))
            self._checksums = _combined(self._checksums, checksum)
        numbers = (checksum, min(size, _LARGE), min(size, _LARGE), len(path), len(wide), 0, 0, 0, 0, min(start, _LARGE))
        self._directory += (struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, _flags(size), 0, 0, 0, *numbers), path, wide)

    def take(self) -> bytes:
        """What was written since the last time, without contents that were not given."""
        written = b"".join(self._parts)
        self._parts = []
        return written

    def finish(self, names: int) -> bytes:
        """The last members and the directory. `names` is torch's hash of the others' names."""
        self.add("version", b"3\n")
        self.add(".data/serialization_id", b"%020d%020d" % (names, self._checksums))
        start, size, count = self._at, sum(map(len, self._directory)), len(self._directory) // 3
        self._parts += self._directory
        numbers = (44, 0x031E, 45, 0, 0, count, count, size, start)
        self._parts.append(struct.pack("<4sQ2H2I4Q", b"PK\6\6", *numbers))
        self._parts.append(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
        self._parts.append(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(start, _LARGE), 0))
        return self.take()

    def _append(self, content: bytes) -> None:
        self._parts.append(content)
        self._at += len(content)


def _path(name: str) -> bytes:
    return b"archive/" + name.encode()


def _flags(size: int) -> int:
    return _UTF8 | _DESCRIPTOR if size else _UTF8


def _wide(size: int, compressed: int, start: int) -> bytes:
    """The extra field for numbers that have no room in a zip's usual fields."""
    numbers = [*((size, compressed) if size >= _LARGE else ()), *((start,) if start >= _LARGE else ())]
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _combined(seed: int, value: int) -> int:
    """torch's c10::hash_combine, of 64 bits."""
    return (seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & ((1 << 64) - 1)
