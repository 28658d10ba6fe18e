"""Reads pictures from untrusted files: checks their bytes, and decodes them to pixels.

A picture stays the bytes that were found; only its header is read until a tile is needed. Values deeper than 8 bits
become pixels in `depth.py`.
"""

from __future__ import annotations

import importlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from PIL import Image, ImageCms, UnidentifiedImageError

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.depth import is_deep, to_grey
from megatron_vita.data.media.structure import PNG, is_whole, jpeg_scan, png_headers
from megatron_vita.data.media.window import open_window
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Others that Pillow knows run programs or open further files."""
MAX_BYTES = 1 << 30
"""Larger picture files are rejected unread."""
MAX_PIXELS = 89_478_485
"""Larger pictures are rejected unread (Pillow's own bound: 256 MiB as RGB)."""
_MOST_HEADER = 8 << 20
"""Bytes in which Pillow must find a header: it goes through junk byte by byte."""
_MOST_RLE = 16 << 20
"""Bytes of a run-length coded BMP, which Pillow decodes in Python."""
_ORIENTATION = 0x0112
"""The EXIF tag of a picture's orientation."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes a picture upright, by its EXIF orientation."""
_OTHERS = {
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"#?R": "Radiance HDR",
    b"v/1\x01": "OpenEXR",
    b"PF\n": "a PFM of three colours",
    b"8BPS": "Photoshop",
    b"DDS ": "DDS",
    b"\0\0\1\0": "an icon",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"II*\0": "a TIFF whose header is damaged, or whose pixels are of a kind that Pillow does not know",
    b"MM\0*": "a TIFF whose header is damaged, or whose pixels are of a kind that Pillow does not know",
}
"""Names of file formats that are not opened, by their first bytes."""
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}

Image.preinit()
for _plugin in ("TiffImagePlugin", "WebPImagePlugin"):  # by default, Pillow loads only the commonest formats
    importlib.import_module(f"PIL.{_plugin}")

# Pillow warns between once and twice its bound, and we reject there; and about EXIF that nobody needs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """Format and size from a picture's header."""

    format: str
    """One of FORMATS, or MPO (several JPEGs in one file, of which the first counts)."""
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    """Pixels, after the EXIF orientation is applied."""


def read_image(
    file: MediaFile, *, verify: str = "structure", check: Callable[[PictureHeader], None] | None = None
) -> MediaItem:
    """Read a picture's bytes and, from its header, its size.

    Args:
        file: a path, a region of a file, or bytes.
        verify: `structure` proves that header and end are there, `decode` that the whole picture can be decoded, too.
        check: is called with the header before a pixel is decoded; what it raises is raised.

    Raises:
        DataError: beginning with media_missing, media_broken, media_truncated, media_bomb or media_size.
    """
    data = _bytes(file)
    with _named(file):
        header = read_header(data)
    if check is not None:
        check(header)
    with _named(file):
        origin = file if file.data is None else None
        item = MediaItem(data, header.width, header.height, origin=origin, max_tiles=file.max_tiles)
        whole = is_whole(header.format, data)
        if whole is False:
            raise reject("media_truncated", "the file ends before the picture does. Fetch it again or drop the sample.")
        if whole is None or verify == "decode":
            decode(item)
    return item


@contextmanager
def _named(file: MediaFile) -> Iterator[None]:
    """Errors say which picture they are about."""
    try:
        yield
    except DataError as error:
        code, _, message = str(error).partition(": ")
        raise reject(code, f"{file.name}: {message}") from None
    except MemoryError:
        raise reject("media_bomb", f"{file.name}: decoding it asks for more memory than there is.") from None


def read_header(data: bytes) -> PictureHeader:
    """A picture's format and upright size, without decoding a pixel.

    Raises:
        DataError: beginning with media_broken, media_truncated, media_bomb or media_size.
    """
    if not data:
        raise reject("media_broken", "the file is empty.")
    if data.startswith(b"\xff\xd8"):
        jpeg_scan(data)  # rejects what would take Pillow long
    if data.startswith(PNG):
        stream = io.BytesIO(png_headers(data))
    else:  # the header of a TIFF may stand at its end
        stream = io.BytesIO(data if data[:4] in (b"II*\0", b"MM\0*", b"RIFF") else data[:_MOST_HEADER])
    with open_picture(stream) as picture:
        width, height = picture.size
        if picture.format == "BMP" and picture.tile[0][0] == "bmp_rle" and len(data) > _MOST_RLE:
            raise reject("media_bomb", f"{len(data)} bytes of run-length coded BMP; at most {_MOST_RLE} are decoded.")
        if _orientation(picture) >= 5:
            width, height = height, width
        return PictureHeader(picture.format or "", width, height)


def decode(item: MediaItem) -> Image.Image:
    """The whole picture, upright, RGB; of an animation or of several pages the first.

    Transparency is laid on white; CMYK and palettes are converted as stock transformers does; deeper values become
    pixels by the rule of `depth.to_grey`.

    Raises:
        DataError: media_broken, media_truncated, media_bomb or media_size.
        MemoryError: it asks for more memory than there is; whose fault that is, the caller knows.
    """
    picture = open_picture(io.BytesIO(item.data))
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        code = "media_truncated" if "truncated" in str(error) else "media_broken"
        raise reject(code, f"the picture cannot be decoded ({error}). Replace the file or drop the sample.") from None
    turn = _TURNS.get(_orientation(picture))
    try:
        rgb = to_rgb(picture)
    except (OSError, ValueError, ImageCms.PyCMSError) as error:  # a mode that Pillow does not convert
        raise reject("media_broken", f"its pixels are no colours ({error}). Drop the sample.") from None
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB.

    Raises:
        DataError: media_broken, for values that are no numbers.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture
    if is_deep(picture):
        return Image.fromarray(to_grey(picture)).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
        assert shown is not None, "None only where the picture is changed in place"
        return shown
    if picture.mode == "La":
        picture = picture.convert("LA")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def open_picture(stream: IO[bytes]) -> Image.Image:
    """Pillow's picture of a stream, not decoded yet; size and format are checked.

    Raises:
        DataError: media_broken, media_bomb or media_size.
        MemoryError: its header asks for more memory than there is.
    """
    try:
        picture = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(64).lstrip()
        if head.startswith(PNG[:4]) and 0 in struct.unpack_from(">II", head.ljust(24, b"x"), 16):
            raise reject("media_size", "a PNG of no width or no height makes no picture.") from None
        what = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
        if head[4:8] == b"ftyp":
            what = _BRANDS.get(head[8:12], what)
        raise reject(
            "media_broken",
            f"{what + ': ' if what else ''}not a picture in one of the formats {', '.join(FORMATS)}. Convert it, or "
            "drop the sample.",
        ) from None
    except Image.DecompressionBombError as error:
        raise reject("media_bomb", f"{error}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged header
        raise reject("media_broken", f"the header cannot be read ({error}).") from None
    width, height = picture.size
    if width < 1 or height < 1:
        raise reject("media_size", f"{width} x {height} pixels make no picture.")
    if width * height > MAX_PIXELS:
        raise reject("media_bomb", f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded.")
    return picture


def _orientation(picture: Image.Image) -> int:
    """How the decoded pixels must be turned, 1 to 8 as EXIF numbers them, from its EXIF block or XMP packet."""
    if picture.format in ("GIF", "BMP", "PPM", "TIFF"):  # a TIFF Pillow turns itself
        return 1
    try:
        value = Image.Image.getexif(picture).get(_ORIENTATION, 1)  # PNG's own would decode the picture
    except MemoryError:
        raise
    except Exception:  # damaged EXIF is no reason to reject a picture: viewers show it as it lies
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _bytes(file: MediaFile) -> bytes:
    if file.data is not None:
        return file.data
    with open_window(file) as window:
        if window.size > MAX_BYTES:
            raise reject("media_bomb", f"{file.name} has {window.size} bytes; a picture may have {MAX_BYTES}.")
        return window.read(0, window.size)
