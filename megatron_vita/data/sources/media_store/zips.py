"""Zip archives: the members that the central directory names, without holding them all in memory.

Format: PKWARE's APPNOTE.TXT 6.3, sections 4.3 to 4.5. (Python's zipfile holds about a kilobyte for each member; some
datasets have millions.)
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.media_store.members import (
    DEFLATED,
    ENCRYPTED,
    HOSTILE_NAME,
    LINK,
    METHOD,
    NO_FILE,
    STORED,
    Member,
    clean_name,
)
from megatron_vita.errors import ConfigError

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
BOMB_RATIO = 250
"""A member may unpack to this many times its size; few pictures pack at all."""
BOMB_FLOOR = 64 << 20
"""Bytes that any member may unpack to."""
_FULL = 0xFFFFFFFF
_BLOCK = 1 << 20


def is_zip(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a zip."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")


def zip_members(path: Path) -> Iterator[Member]:
    """Every file of a zip, in the order of its directory.

    Raises:
        ConfigError: it has several volumes, is cut short or damaged.
    """
    with path.open("rb") as stream:
        size, count, shift = _directory(path, stream)
        begin = stream.tell()
        buffer, place, left = b"", 0, size
        for _ in range(count):
            if len(buffer) - place < _ENTRY.size + 3 * 65535 and left:
                block = stream.read(min(_BLOCK, left))
                left -= len(block)
                buffer, place = buffer[place:] + block, 0
            member, length = _entry(path, buffer, place, shift)
            place += length
            if member is not None:
                if not 0 <= member.header < begin:
                    raise ConfigError(f"{path}: the zip's directory is damaged. Fetch it again.")
                yield member


def data_offset(stream_fd: int, header: int) -> int:
    """Offset of the data behind a local header.

    Raises:
        DataError: media_broken, there is no header.
    """
    head = os.pread(stream_fd, _LOCAL.size, header)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise reject("media_broken", "its header in the zip is damaged.")
    fields = _LOCAL.unpack(head)
    return header + _LOCAL.size + int(fields[9]) + int(fields[10])


def local_name(stream_fd: int, header: int) -> str:
    """The name in a local header.

    Raises:
        DataError: as `data_offset`.
    """
    data_offset(stream_fd, header)
    flags, length = struct.unpack("<H18xH", os.pread(stream_fd, 22, header + 6))
    return _text(os.pread(stream_fd, length, header + _LOCAL.size), flags)


def inflate(stream_fd: int, header: int, size: int, crc: int, stored: bool = False) -> Iterator[bytes]:
    """The content of a member, block by block, checked at the end.

    Args:
        stream_fd: the zip.
        header: offset of its local header.
        size: its bytes, as the directory says.
        crc: CRC-32, as the directory says.
        stored: it is not packed.

    Raises:
        DataError: media_broken, media_truncated or media_bomb.
    """
    begin = place = data_offset(stream_fd, header)
    given = sum32 = 0
    decoder = zlib.decompressobj(-15)
    pending = b""
    while given < size or not (stored or decoder.eof):
        if not pending:
            pending = os.pread(stream_fd, min(64 << 10, size - given) if stored else 64 << 10, place)
            place += len(pending)
            if not pending:
                raise reject("media_truncated", "it ends early.")
        try:
            # one byte more than it should have: a member that is larger is found out without unpacking it
            piece = pending if stored else decoder.decompress(pending, min(_BLOCK, size - given + 1))
        except zlib.error as error:
            raise reject("media_broken", f"it is damaged ({error}).") from None
        pending = b"" if stored else decoder.unconsumed_tail
        given += len(piece)
        sum32 = zlib.crc32(piece, sum32)
        if given > size or (not stored and decoder.eof and given < size):
            raise reject("media_broken", f"it has not the {size} bytes that the zip says.")
        taken = place - begin - len(pending)
        if given > max(BOMB_FLOOR, BOMB_RATIO * taken):
            raise reject("media_bomb", f"{taken} bytes of the zip unpack to more than {given}.")
        if piece:
            yield piece
    if sum32 != crc:
        raise reject("media_broken", "its checksum is wrong.")


def _directory(path: Path, stream: BinaryIO) -> tuple[int, int, int]:
    """(bytes of the directory, its entries, how far all offsets are shifted); the stream stands at its begin."""
    size = stream.seek(0, 2)
    tail_start = max(0, size - _END.size - 65535)
    stream.seek(tail_start)
    tail = stream.read()
    found = len(tail)
    while (found := tail.rfind(b"PK\x05\x06", 0, found)) >= 0:
        comment = tail[found + _END.size :]
        if tail[found + 20 : found + 22] == len(comment).to_bytes(3, "little")[:2]:
            break  # else it was part of the comment
    if found < 0:
        raise ConfigError(f"{path}: no whole zip, its end is missing. Fetch it again.")
    end = tail_start + found
    _, disk, directory_disk, _, count, length, offset, _ = _END.unpack_from(tail, found)
    end64 = 0
    if end >= _LOCATOR.size + _END64.size:
        stream.seek(end - _LOCATOR.size)
        magic, _, _, disks = _LOCATOR.unpack(stream.read(_LOCATOR.size))
        if magic == b"PK\x06\x07":
            if disks > 1:
                raise several_volumes(path)
            end64 = _LOCATOR.size + _END64.size
            stream.seek(end - end64)
            fields = _END64.unpack(stream.read(_END64.size))
            if fields[0] != b"PK\x06\x06":
                raise ConfigError(f"{path}: the zip's directory is damaged. Fetch it again.")
            disk, directory_disk, count, length, offset = fields[4], fields[5], fields[7], fields[8], fields[9]
    if disk not in (0, 0xFFFF) or directory_disk not in (0, 0xFFFF):
        raise several_volumes(path)
    begin = end - end64 - length
    if begin < offset or begin < 0:
        raise ConfigError(f"{path}: the zip's directory is damaged. Fetch it again.")
    stream.seek(begin)
    return length, count, begin - offset


def _entry(path: Path, buffer: bytes, place: int, shift: int) -> tuple[Member | None, int]:
    if len(buffer) - place < _ENTRY.size or buffer[place : place + 4] != b"PK\x01\x02":
        raise ConfigError(f"{path}: the zip's directory is damaged. Fetch it again.")
    (_, made, _, flags, method, _, _, crc, packed, size, named, extras, comment, disk, _, attributes, header) = (
        _ENTRY.unpack_from(buffer, place)
    )
    length = _ENTRY.size + named + extras + comment
    start = place + _ENTRY.size
    raw = buffer[start : start + named]
    if _FULL in (size, packed, header):
        size, packed, header = _large(buffer[start + named : start + named + extras], size, packed, header)
    if disk not in (0, 0xFFFF):
        raise several_volumes(path)
    text = _text(raw, flags)
    if text.endswith("/"):
        return None, length
    name, clean = clean_name(text)
    mode = attributes >> 16 if made >> 8 == 3 else 0  # 3: made on Unix
    kind = STORED if method == 0 else DEFLATED
    if not clean:
        kind = HOSTILE_NAME
    elif stat.S_ISLNK(mode):
        kind = LINK
    elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        kind = NO_FILE
    elif flags & 0x41:
        kind = ENCRYPTED
    elif method not in (0, 8) or (method == 0 and packed != size):
        kind = METHOD
    return Member(name, kind, header + shift, header + shift, size, packed, crc), length


def _large(extra: bytes, *values: int) -> tuple[int, int, int]:
    """Values that do not fit 32 bits stand in an extra field, in this order, those that are full alone."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            given = extra[place + 4 : place + 4 + length]
            out = []
            for value in values:
                if value == _FULL and len(given) >= 8:
                    value, given = int.from_bytes(given[:8], "little"), given[8:]
                out.append(value)
            return out[0], out[1], out[2]
        place += 4 + length
    return values[0], values[1], values[2]


def _text(raw: bytes, flags: int) -> str:
    if flags & 0x800:
        return raw.decode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8")  # many writers use it without saying so
    except UnicodeDecodeError:
        return raw.decode("cp437")


def several_volumes(path: Path) -> ConfigError:
    """The error for a zip in several volumes (`.z01 .z02 ... .zip`)."""
    whole = path.with_name(f"{path.stem}_whole.zip")
    return ConfigError(f"{path}: a zip of several volumes. Join them: zip -s 0 {path} --out {whole}")
