"""Pictures: from a stranger's file to checked bytes, and from those to pixels. Nothing here trusts a file.

A picture stays the bytes that were found; only its header is read until a tile is needed.
"""

from __future__ import annotations

import importlib
import io
import os
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_vita.data.example import MediaItem
from megatron_vita.data.rejects import refuse
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Others that Pillow knows run programs or open further files."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused unread (Pillow's own bound: 256 MiB as RGB)."""
MAX_BYTES = 1 << 30
"""Larger picture files are refused unread."""
_PNG_ORIENTED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

Image.preinit()
for _plugin in ("TiffImagePlugin", "WebPImagePlugin"):  # Pillow knows only the commonest formats until it is told
    importlib.import_module(f"PIL.{_plugin}")

# Pillow warns between once and twice its bound and we refuse there, so the warning would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(file: MediaFile, *, verify: str = "structure") -> MediaItem:
    """Read a picture and learn its size from the header.

    Args:
        file: a path or bytes.
        verify: `structure` proves that header and end are there, `decode` decodes the whole picture.

    Raises:
        DataError: beginning with media_missing, media_broken, media_truncated, media_bomb or media_size.
    """
    data = _bytes(file)
    name = file.name
    try:
        picture = _open(data)
        width, height = picture.size
        turned = _orientation(picture, data) >= 5
    except DataError as error:
        raise _named(error, name) from None
    if turned:
        width, height = height, width
    item = MediaItem(data, width, height, origin=file if file.data is None else None)
    try:
        if verify == "decode":
            decode(item)
        else:
            _check_end(picture.format or "", data)
    except DataError as error:
        raise _named(error, name) from None
    return item


def decode(item: MediaItem) -> Image.Image:
    """The whole picture, upright, RGB.

    Transparency is laid on white and CMYK and palettes are converted as stock transformers does. 16-bit grey is scaled
    to 8 bits (Pillow would cut it off at 255). Of an animation the first picture counts.

    Raises:
        DataError: media_broken, media_truncated, media_bomb or media_size.
    """
    picture = _open(item.data)
    try:
        if _orientation(picture, item.data) != 1:
            picture = ImageOps.exif_transpose(picture)
        return to_rgb(picture)
    except (OSError, ValueError, SyntaxError, IndexError, KeyError, zlib.error, Image.DecompressionBombError) as error:
        code = "media_truncated" if "truncated" in str(error) else "media_broken"
        raise refuse(code, f"the picture cannot be decoded ({error}). Replace the file or drop the sample.") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        top = 255.0 if picture.mode in ("I", "F") and values.max(initial=0) <= 255 else 65535.0
        grey = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _bytes(file: MediaFile) -> bytes:
    if file.data is not None:
        return file.data
    if file.path is None:
        raise refuse("media_missing", "the record gives neither a path nor bytes.")
    try:
        with open(file.path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size if file.size is None else file.size
            if size > MAX_BYTES:
                raise refuse("media_bomb", f"{file.name} has {size} bytes; a picture may have {MAX_BYTES}.")
            stream.seek(file.offset)
            return stream.read(size)
    except OSError as error:
        raise refuse("media_missing", f"{file.name} cannot be read ({error.strerror}).") from None


def _open(data: bytes) -> Image.Image:
    """Parse the header."""
    if not data:
        raise refuse("media_broken", "the file is empty.")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise refuse("media_broken", f"not a picture in one of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise refuse("media_bomb", f"{error}") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged header
        raise refuse("media_broken", f"the header cannot be read ({error}).") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise refuse("media_bomb", f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded.")
    if min(width, height) < 1 or max(width, height) > 1000 * min(width, height):
        raise refuse("media_size", f"{width} x {height} pixels make no picture.")
    return picture


def _orientation(picture: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1..8. Asking a PNG for it makes Pillow decode it, so only those that may have one are asked."""
    if picture.format in ("GIF", "BMP", "PPM"):
        return 1
    if picture.format == "PNG" and not any(mark in data for mark in _PNG_ORIENTED):
        return 1
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF is no reason to refuse a picture: viewers show it as it lies
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_end(kind: str, data: bytes) -> None:
    """Prove without decoding that the file is whole: JPEG's end mark, PNG's chunk checksums, WebP's and BMP's size."""
    if kind in ("JPEG", "MPO"):
        whole = data.find(b"\xff\xd9", _jpeg_scan(data)) >= 0
    elif kind == "PNG":
        whole = _png_chunks(data)
    elif kind == "WEBP":
        whole = len(data) >= int.from_bytes(data[4:8], "little") + 8
    elif kind == "BMP":
        whole = len(data) >= int.from_bytes(data[2:6], "little")
    elif kind == "GIF":
        whole = data.rstrip(b"\0").endswith(b";")
    else:
        decode(MediaItem(data, 0, 0))
        return
    if not whole:
        raise refuse("media_truncated", "the file ends before the picture does. Fetch it again or drop the sample.")


def _jpeg_scan(data: bytes) -> int:
    """Where the (first) scan begins, behind thumbnails inside headers; the end of the data if there is none."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:
            return place
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # fill byte or mark without length
            place += 1 if marker == 0xFF else 2
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _png_chunks(data: bytes) -> bool:
    place = 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        kind, end = data[place + 4 : place + 8], place + 8 + size
        if end + 4 > len(data):
            return False
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise refuse(
                "media_broken", f"PNG chunk {kind.decode('latin-1')!r} has a wrong checksum. Fetch the file again."
            )
        if kind == b"IEND":
            return True
        place = end + 4
    return False


def _named(error: DataError, name: str) -> DataError:
    code, _, message = str(error).partition(": ")
    return refuse(code, f"{name}: {message}")
