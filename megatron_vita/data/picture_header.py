"""A picture's format, upright size and wholeness from its header and its end, without decoding a pixel.

JPEG, PNG, WebP, GIF and BMP are parsed here, by few short reads; what the parsers do not take for plain (damaged,
exotic, TIFF, PPM) Pillow decides, so the two cannot disagree: `tests/data/test_media.py` holds them together.

Sources: ITU-T T.81 (JPEG), the PNG specification (third edition), the WebP container specification, GIF89a, TIFF 6.0
with EXIF 2.3 for the orientation, and what Pillow makes of files that break them.
"""

from __future__ import annotations

import importlib
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError

from megatron_vita.data.rejects import refuse
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.window import Window, open_window
from megatron_vita.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Others that Pillow knows run programs or open further files."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused unread (Pillow's own bound: 256 MiB as RGB)."""
MAX_TEXT = 1 << 20
"""Bytes that a compressed text chunk of a PNG may decompress to (Pillow's own bound)."""

MOST_PIECES = 1 << 18
"""Segments, chunks or blocks of a picture that are walked through; plain files have some hundreds."""
_MOST_HEADER = 8 << 20
"""Bytes in which Pillow must find a header that is not plain: it goes through junk byte by byte."""
_MOST_RLE = 16 << 20
"""Bytes of a run-length coded BMP, which Pillow decodes in Python."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture lies."""

Image.preinit()
for _plugin in ("TiffImagePlugin", "WebPImagePlugin"):  # Pillow knows only the commonest formats until it is told
    importlib.import_module(f"PIL.{_plugin}")

# Pillow warns between once and twice its bound and we refuse there, so the warning would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_JPEG_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_JPEG_BARE = frozenset((0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)))
"""Markers that stand without a length, or that no header holds."""
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bit depths that exist, by colour type."""
_PNG_TEXTS = {b"Raw profile type exif", b"XML:com.adobe.xmp"}


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """What a picture says of itself."""

    format: str
    """One of FORMATS, or MPO (several JPEGs in one file, of which the first counts)."""
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    """Pixels, after the EXIF orientation is applied."""
    orientation: int = 1
    """How the decoded pixels must be turned, 1 to 8 as EXIF numbers them."""


class _NotPlainError(Exception):
    """The parser does not take the file for plain: Pillow shall look at it."""


def read_header(file: MediaFile) -> PictureHeader:
    """The header of a picture file, region of a file, or bytes; of a file, only the blocks that are needed are read.

    Raises:
        DataError: beginning with media_missing, media_broken, media_bomb or media_size.
    """
    with open_window(file) as window:
        return parse_header(window)


def parse_header(window: Window) -> PictureHeader:
    """The header of a picture.

    Raises:
        DataError: beginning with media_broken, media_bomb or media_size.
    """
    if not window.size:
        raise refuse("media_broken", "the file is empty.")
    try:
        kind, width, height, orientation = _parse(window)
    except (_NotPlainError, IndexError, struct.error):  # what is not there ends the parsing as what is odd does
        kind, width, height, orientation = _ask_pillow(window)
    # Pillow turns a TIFF itself, and tells the size of the turned picture
    turned = orientation >= 5 and kind != "TIFF"
    check_size(width, height)
    return PictureHeader(kind, height if turned else width, width if turned else height, orientation)


def _too_many(what: str) -> DataError:
    return refuse("media_broken", f"more than {MOST_PIECES} {what}.")


def check_size(width: int, height: int) -> None:
    """Refuse what has no area, or too many pixels to decode.

    Raises:
        DataError: media_bomb or media_size.
    """
    if width < 1 or height < 1:
        raise refuse("media_size", f"{width} x {height} pixels make no picture.")
    if width * height > MAX_PIXELS:
        raise refuse("media_bomb", f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded.")


def open_picture(stream: IO[bytes]) -> Image.Image:
    """Pillow's picture of a stream, not decoded yet; size and format are checked.

    Raises:
        DataError: media_broken, media_bomb or media_size.
    """
    try:
        picture = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise refuse("media_broken", f"not a picture in one of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise refuse("media_bomb", f"{error}") from None
    except MemoryError:
        raise refuse("media_bomb", "its header asks for more memory than there is.") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged header
        raise refuse("media_broken", f"the header cannot be read ({error}).") from None
    check_size(*picture.size)
    return picture


def _ask_pillow(window: Window) -> tuple[str, int, int, int]:
    whole = window.head[:4] in (b"II*\0", b"MM\0*", b"RIFF")  # the header of a TIFF may stand at its end
    with open_picture(window.stream(window.size if whole else _MOST_HEADER)) as picture:
        kind = picture.format or ""
        if kind in ("GIF", "BMP", "PPM"):
            return kind, *picture.size, 1
        try:
            value = picture.getexif().get(ORIENTATION, 1)
        except Exception:  # damaged EXIF is no reason to refuse a picture: viewers show it as it lies
            value = 1
        return kind, *picture.size, value if isinstance(value, int) and 1 <= value <= 8 else 1


def _parse(window: Window) -> tuple[str, int, int, int]:
    """(format, width and height as stored, orientation)."""
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
    raise _NotPlainError


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
            raise _NotPlainError
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if length < 2 or place + 2 + length > size:
            raise _NotPlainError
        if marker == 0xDA:
            break
        if marker in _JPEG_FRAMES:
            layers = block[at + 9]
            if block[at + 4] != 8 or layers not in (1, 3, 4) or length < 8 + 3 * layers:
                raise _NotPlainError
            height, width = (block[at + 5] << 8) | block[at + 6], (block[at + 7] << 8) | block[at + 8]
        elif marker == 0xE1:
            if block[at + 4 : at + 10] == b"Exif\0\0":
                if exif is not None:  # continued: Pillow joins the pieces
                    raise _NotPlainError
                exif = place + 10, length - 8
            elif window.read(place + 4, 29) == b"http://ns.adobe.com/xap/1.0/\0":
                xmp = place + 33, length - 31
        elif marker == 0xE2 and block[at + 4 : at + 8] == b"MPF\0":
            several = True
        place += 2 + length
    else:
        raise _too_many("JPEG segments")
    if several or not width or not height:  # whether it is an MPO depends on its index of pictures
        raise _NotPlainError
    orientation = _exif_orientation(window, *exif) if exif is not None else None
    if orientation is None and xmp is not None:
        orientation = _xmp_orientation(window.read(*xmp))
    return "JPEG", width, height, _valid(orientation)


# ------------------------------------------------------------------------------------------------------------- PNG


def _png(window: Window) -> tuple[str, int, int, int]:
    """IHDR, then every chunk's name, for EXIF and XMP may stand behind the pixels."""
    block = window.read(8, 25)
    length, name, width, height, depth, colour = struct.unpack_from(">I4sIIBB", block)
    crc = int.from_bytes(block[21:25], "big")
    if length != 13 or name != b"IHDR" or depth not in _PNG_DEPTHS.get(colour, ()) or crc != zlib.crc32(block[4:21]):
        raise _NotPlainError
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
        orientation = _exif_orientation(open_window(MediaFile(data=exif)), 0, len(exif))
    if orientation is None and xmp is not None:
        orientation = _xmp_orientation(xmp)
    return "PNG", width, height, _valid(orientation)


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
        raise _NotPlainError
    return "WEBP", width, height, _valid(orientation)


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
        orientation = _exif_orientation(window, *found[b"EXIF"])
    if orientation is None and flags & 0x04 and b"XMP " in found:
        orientation = _xmp_orientation(window.read(*found[b"XMP "]))
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
            raise _NotPlainError
    raise _too_many("GIF blocks")


def _bmp(window: Window) -> tuple[str, int, int, int]:
    head = window.read(0, 54)
    size = int.from_bytes(head[14:18], "little")
    if size not in (40, 52, 56, 64, 108, 124) or len(head) < 54:
        raise _NotPlainError
    width, height, _, bits, packed = struct.unpack_from("<iiHHI", head, 18)
    if bits not in (1, 4, 8, 16, 24, 32) or packed not in (0, 1, 2, 3) or width < 1 or not height:
        raise _NotPlainError
    if packed in (1, 2) and window.size > _MOST_RLE:
        raise refuse("media_bomb", f"{window.size} bytes of run-length coded BMP; at most {_MOST_RLE} are decoded.")
    if height < 0 and head[25] != 0xFF:  # upside down by more rows than Pillow believes
        raise _NotPlainError
    return "BMP", width, abs(height), 1


# ----------------------------------------------------------------------------------------------------- orientation


def _valid(orientation: int | None) -> int:
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


def _xmp_orientation(packet: bytes) -> int | None:
    match = _XMP_ORIENTATION.search(packet)
    return int(match[1]) if match else None


def _exif_orientation(window: Window, place: int, size: int) -> int | None:
    """Orientation in an EXIF block (a small TIFF); None if it says nothing. Only its first directory is read."""
    for _ in range(2):  # the mark may stand twice
        if window.read(place, 6) == b"Exif\0\0":
            place, size = place + 6, size - 6
    head = window.read(place, 8)
    if head[:4] == b"MM\0\x2a":
        order = ">"
    elif head[:4] == b"II\x2a\0":
        order = "<"
    else:
        return _exif_by_pillow(window.read(place, size))
    (start,) = struct.unpack(order + "I", head[4:8])
    if start + 2 > size:
        return _exif_by_pillow(window.read(place, size))
    (count,) = struct.unpack(order + "H", window.read(place + start, 2))
    entries = window.read(place + start + 2, 12 * count)
    if start + 2 + 12 * count > size or len(entries) < 12 * count:
        return _exif_by_pillow(window.read(place, size))
    found = None
    mark = struct.pack(order + "H", ORIENTATION)
    for at in range(0, 12 * count, 12):
        if entries[at : at + 2] == mark:
            kind, number, value = struct.unpack(order + "HIH", entries[at + 2 : at + 10])
            if (kind, number) != (3, 1):
                return _exif_by_pillow(window.read(place, size))
            found = value
    return found


def _exif_by_pillow(block: bytes) -> int | None:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(block)
            value = exif.get(ORIENTATION)
    except Exception:  # damaged EXIF is no reason to refuse a picture
        return None
    return value if isinstance(value, int) else 0 if value is not None else None
