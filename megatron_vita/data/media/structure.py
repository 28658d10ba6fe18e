"""Is a picture file whole? By its segments, chunks and sizes, without decoding a pixel."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from megatron_vita.data.rejects import reject

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""
_MOST_CHUNKS = 1 << 18
"""Segments or chunks of a picture that are walked through; plain files have some hundreds."""


def is_whole(kind: str, data: bytes) -> bool | None:
    """Whether a file is complete by its format's structure; None where only decoding shows it.

    Args:
        kind: Pillow's name of the format.
        data: the file.

    Raises:
        DataError: media_broken, if a checksum is wrong.
    """
    if kind in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9", jpeg_scan(data)) >= 0  # from the end, for there it stands
    if kind == "PNG":
        return _png_is_whole(data)
    if kind == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    if kind == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little")
    if kind == "GIF":
        return data.rstrip(b"\0").endswith(b";")
    return None


def jpeg_scan(data: bytes) -> int:
    """Where the (first) scan begins, behind thumbnails inside headers; the end of the data if there is none.

    Raises:
        DataError: media_broken, if there are too many segments before it.
    """
    place, size = 2, len(data)
    for _ in range(_MOST_CHUNKS):
        if place + 4 > size:
            break
        marker = data[place + 1]
        if data[place] != 0xFF or marker == 0xDA:  # (Pillow passes over junk between segments)
            return place
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # fill byte or mark without length
            place += 1 if marker == 0xFF else 2
            continue
        place += 2 + ((data[place + 2] << 8) | data[place + 3])
    else:
        raise reject("media_broken", f"more than {_MOST_CHUNKS} JPEG segments.")
    return size


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk of a PNG, up to its end or the file's."""
    place = 8
    for _ in range(_MOST_CHUNKS):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        name = data[place + 4 : place + 8]
        if end > len(data) or len(name) < 4:
            return
        yield name, place, end
        if name == b"IEND":
            return
        place = end
    raise reject("media_broken", f"more than {_MOST_CHUNKS} PNG chunks.")


def png_headers(data: bytes) -> bytes:
    """A PNG without its pixels: all chunks that Pillow checks before and behind them.

    EXIF, and texts that it refuses, may stand behind the pixels, too.
    """
    out, animated, pixels = [PNG], False, False
    for name, start, end in _png_chunks(data):
        animated |= name == b"acTL"
        pixels |= name == b"IDAT"
        if pixels and animated and name == b"fcTL":  # there Pillow stops reading
            break
        if name not in (b"IDAT", b"IEND"):
            out.append(data[start:end])
    return b"".join((*out, *(bytes(4) + name + zlib.crc32(name).to_bytes(4, "big") for name in (b"IDAT", b"IEND"))))


def _png_is_whole(data: bytes) -> bool:
    """Whether every chunk up to the end is complete.

    Raises:
        DataError: media_broken, if a checksum is wrong.
    """
    name, view = b"", memoryview(data)
    for name, start, end in _png_chunks(data):
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise reject(
                "media_broken", f"PNG chunk {name.decode('latin-1')!r} has a wrong checksum. Fetch the file again."
            )
    return name == b"IEND"
