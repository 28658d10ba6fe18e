"""Format, stored size and orientation of plain JPEG, PNG, WebP, GIF and BMP files, by few short reads.

What is damaged or exotic is not plain, and is left to Pillow. Sources: ITU-T T.81 (JPEG), the PNG specification (third
edition), the WebP container specification, GIF89a, and what Pillow makes of files that break them.
"""

from __future__ import annotations

import struct
import zlib

from megatron_vita.data.media.orientation import exif_orientation, valid, xmp_orientation
from megatron_vita.data.media.window import Window, open_window
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError

MAX_TEXT = 1 << 20
"""Bytes that a compressed text chunk of a PNG may decompress to (Pillow's own bound)."""

MOST_PIECES = 1 << 18
"""Segments, chunks or blocks of a picture that are walked through; plain files have some hundreds."""
_MOST_RLE = 16 << 20
"""Bytes of a run-length coded BMP, which Pillow decodes in Python."""

_JPEG_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_JPEG_BARE = frozenset((0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)))
"""Markers that stand without a length, or that no header holds."""
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bit depths that exist, by colour type."""
_PNG_TEXTS = {b"Raw profile type exif", b"XML:com.adobe.xmp"}


class NotPlainError(Exception):
    """The parser does not take the file for plain: Pillow shall look at it."""


def parse_plain(window: Window) -> tuple[str, int, int, int]:
    """(format, width and height as stored, orientation).

    Raises:
        NotPlainError: ask Pillow. (So do IndexError and struct.error: something is not there.)
        DataError: media_broken or media_bomb, if only the time or memory that it takes could say more.
    """
    head = window.head
    if head[:3] == b"\xff\xd8\xff":
        return _jpeg(window)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(window)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp(window)
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(window)
    if head[:2] == b"BM":
        return _bmp(window)
    raise NotPlainError


# ------------------------------------------------------------------------------------------------------------ JPEG


def _jpeg(window: Window) -> tuple[str, int, int, int]:
    """Segments up to the first scan. Of several frames the last counts, of several XMP packets too, as for Pillow."""
    head, size = window.head, window.size
    bound = len(head) - 10
    place, width, height = 2, 0, 0
    exif: tuple[int, int] | None = None
    xmp: tuple[int, int] | None = None
    several = False
    for _ in range(MOST_PIECES):
        if place <= bound:
            block, at = head, place
        else:
            block, at = window.read(place, 10), 0
        marker, length = block[at + 1], (block[at + 2] << 8) | block[at + 3]
        if block[at] != 0xFF or marker in _JPEG_BARE:
            raise NotPlainError
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if length < 2 or place + 2 + length > size:
            raise NotPlainError
        if marker == 0xDA:
            break
        if marker in _JPEG_FRAMES:
            layers = block[at + 9]
            if block[at + 4] != 8 or layers not in (1, 3, 4) or length < 8 + 3 * layers:
                raise NotPlainError
            height, width = (block[at + 5] << 8) | block[at + 6], (block[at + 7] << 8) | block[at + 8]
        elif marker == 0xE1:
            if block[at + 4 : at + 10] == b"Exif\0\0":
                if exif is not None:  # continued: Pillow joins the pieces
                    raise NotPlainError
                exif = place + 10, length - 8
            elif window.read(place + 4, 29) == b"http://ns.adobe.com/xap/1.0/\0":
                xmp = place + 33, length - 31
        elif marker == 0xE2 and block[at + 4 : at + 8] == b"MPF\0":
            several = True
        place += 2 + length
    else:
        raise _too_many("JPEG segments")
    if several or not width or not height:  # whether it is an MPO depends on its index of pictures
        raise NotPlainError
    orientation = exif_orientation(window, *exif) if exif is not None else None
    if orientation is None and xmp is not None:
        orientation = xmp_orientation(window.read(*xmp))
    return "JPEG", width, height, valid(orientation)


# ------------------------------------------------------------------------------------------------------------- PNG


def _png(window: Window) -> tuple[str, int, int, int]:
    """IHDR, then every chunk's name, for EXIF and XMP may stand behind the pixels."""
    block = window.read(8, 25)
    length, name, width, height, depth, colour = struct.unpack_from(">I4sIIBB", block)
    crc = int.from_bytes(block[21:25], "big")
    if length != 13 or name != b"IHDR" or depth not in _PNG_DEPTHS.get(colour, ()) or crc != zlib.crc32(block[4:21]):
        raise NotPlainError
    orientation = xmp = None
    exif: bytes | None = None
    raw: bytes | None = None
    place, size = 33, window.size
    head = window.head
    bound = len(head) - 8
    for _ in range(MOST_PIECES):
        if place + 8 > size:
            break
        block, at = (head, place) if place <= bound else (window.read(place, 8), 0)
        length, name = struct.unpack_from(">I4s", block, at)
        if name == b"IDAT":
            pass
        elif name == b"IEND":
            break
        elif name == b"eXIf":
            exif = window.read(place + 8, length)
        elif name in (b"tEXt", b"zTXt", b"iTXt") and length < MAX_TEXT:
            key, value = _png_text(name, window.read(place + 8, length))
            if key == b"XML:com.adobe.xmp":
                xmp = value
            elif key == b"Raw profile type exif" and name != b"iTXt":
                raw = value
        place += 12 + length
    else:
        raise _too_many("PNG chunks")
    if exif is None and raw is not None:
        try:
            exif = bytes.fromhex("".join(raw.decode("latin-1").split("\n")[3:]))
        except ValueError:
            exif = xmp = None
    if exif:
        orientation = exif_orientation(open_window(MediaFile(data=exif)), 0, len(exif))
    if orientation is None and xmp is not None:
        orientation = xmp_orientation(xmp)
    return "PNG", width, height, valid(orientation)


def _png_text(name: bytes, body: bytes) -> tuple[bytes, bytes]:
    """(key, text) of a text chunk; the text of other keys than those that are asked for is left out."""
    key, _, rest = body.partition(b"\0")
    if key not in _PNG_TEXTS:
        return key, b""
    packed = name == b"zTXt"
    if name == b"zTXt":
        rest = rest[1:]
    elif name == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    if packed:
        try:
            rest = zlib.decompressobj().decompress(rest, MAX_TEXT)
        except zlib.error:
            rest = b""
    return key, rest


# ---------------------------------------------------------------------------------------------- WebP, GIF, BMP


def _webp(window: Window) -> tuple[str, int, int, int]:
    head = window.read(0, 30)
    kind = head[12:16]
    orientation: int | None = None
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", head, 26))
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    elif kind == b"VP8X" and len(head) == 30:
        width = int.from_bytes(head[24:27], "little") + 1
        height = int.from_bytes(head[27:30], "little") + 1
        orientation = _webp_orientation(window, head[20])
    else:
        raise NotPlainError
    return "WEBP", width, height, valid(orientation)


def _webp_orientation(window: Window, flags: int) -> int | None:
    """From the EXIF or XMP chunk, of each the first, and only where the header announces it (as libwebp does)."""
    if not flags & 0x0C:
        return None
    found: dict[bytes, tuple[int, int]] = {}
    place, end = 12, min(window.size, int.from_bytes(window.head[4:8], "little") + 8)
    for _ in range(MOST_PIECES):
        if place + 8 > end:
            break
        name, length = struct.unpack("<4sI", window.read(place, 8))
        found.setdefault(name, (place + 8, min(length, end - place - 8)))
        place += 8 + length + (length & 1)
    else:
        raise _too_many("WebP chunks")
    orientation = None
    if flags & 0x08 and b"EXIF" in found:
        orientation = exif_orientation(window, *found[b"EXIF"])
    if orientation is None and flags & 0x04 and b"XMP " in found:
        orientation = xmp_orientation(window.read(*found[b"XMP "]))
    return orientation


def _gif(window: Window) -> tuple[str, int, int, int]:
    """The screen, made larger where the first picture goes beyond it, as Pillow does."""
    head = window.read(0, 13)
    width, height, flags = struct.unpack_from("<HHB", head, 6)
    place = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    inside = False  # of an extension, whose data come in blocks
    for _ in range(MOST_PIECES):
        kind = window.read(place, 1)[0]
        if inside:
            inside = kind != 0
            place += 1 + kind
        elif kind == 0x2C:
            left, top, wide, high = struct.unpack("<4H", window.read(place + 1, 8))
            return "GIF", max(width, left + wide), max(height, top + high), 1
        elif kind == 0x21:
            inside = True
            place += 2
        else:
            raise NotPlainError
    raise _too_many("GIF blocks")


def _bmp(window: Window) -> tuple[str, int, int, int]:
    head = window.read(0, 54)
    size = int.from_bytes(head[14:18], "little")
    if size not in (40, 52, 56, 64, 108, 124) or len(head) < 54:
        raise NotPlainError
    width, height, _, bits, packed = struct.unpack_from("<iiHHI", head, 18)
    if bits not in (1, 4, 8, 16, 24, 32) or packed not in (0, 1, 2, 3) or width < 1 or not height:
        raise NotPlainError
    if packed in (1, 2) and window.size > _MOST_RLE:
        raise reject("media_bomb", f"{window.size} bytes of run-length coded BMP; at most {_MOST_RLE} are decoded.")
    if height < 0 and head[25] != 0xFF:  # upside down by more rows than Pillow believes
        raise NotPlainError
    return "BMP", width, abs(height), 1


def _too_many(what: str) -> DataError:
    return reject("media_broken", f"more than {MOST_PIECES} {what}.")
