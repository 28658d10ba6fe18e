"""Pictures: from a stranger's file to checked bytes, and from those to pixels. Nothing here trusts a file.

A picture stays the bytes that were found; only its header is read until a tile is needed.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.picture_formats import MOST_PIECES
from megatron_vita.data.media.picture_header import MAX_PIXELS, open_picture, parse_header
from megatron_vita.data.media.window import Window, open_window
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "decode", "read_image", "to_rgb"]

MAX_BYTES = 1 << 30
"""Larger picture files are refused unread."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


def read_image(file: MediaFile, *, verify: str = "structure") -> MediaItem:
    """Read a picture and learn its size from the header.

    Args:
        file: a path, a region of a file, or bytes.
        verify: `structure` proves that header and end are there, `decode` that the whole picture can be decoded, too.

    Raises:
        DataError: beginning with media_missing, media_broken, media_truncated, media_bomb or media_size.
    """
    data = _bytes(file)
    try:
        header = parse_header(Window(data, len(data)))
        item = MediaItem(data, header.width, header.height, origin=file if file.data is None else None)
        _check_end(header.format, data)
        if verify == "decode":
            decode(item)
    except DataError as error:
        raise _named(error, file.name) from None
    except MemoryError:
        raise reject("media_bomb", f"{file.name}: decoding it asks for more memory than there is.") from None
    return item


def decode(item: MediaItem) -> Image.Image:
    """The whole picture, upright, RGB.

    Transparency is laid on white and CMYK and palettes are converted as stock transformers does. 16-bit grey is scaled
    to 8 bits (Pillow would cut it off at 255). Of an animation the first picture counts.

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
    if picture.format != "TIFF":  # that one Pillow has turned already
        turn = _TURNS.get(parse_header(Window(item.data, len(item.data))).orientation)
        if turn is not None:
            picture = picture.transpose(turn)
    try:
        return to_rgb(picture)
    except (OSError, ValueError) as error:  # a mode that Pillow does not convert
        raise reject("media_broken", f"its pixels are no colours ({error}). Drop the sample.") from None


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
    with open_window(file) as window:
        if window.size > MAX_BYTES:
            raise reject("media_bomb", f"{file.name} has {window.size} bytes; a picture may have {MAX_BYTES}.")
        return window.read(0, window.size)


def _check_end(kind: str, data: bytes) -> None:
    """Prove without decoding that the file is whole: JPEG's end mark, PNG's chunk checksums, WebP's and BMP's size."""
    if kind in ("JPEG", "MPO"):
        whole = data.rfind(b"\xff\xd9", _jpeg_scan(data)) >= 0  # from the end, for there it stands
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
        raise reject("media_truncated", "the file ends before the picture does. Fetch it again or drop the sample.")


def _jpeg_scan(data: bytes) -> int:
    """Where the (first) scan begins, behind thumbnails inside headers; the end of the data if there is none."""
    place, size = 2, len(data)
    for _ in range(MOST_PIECES):
        if place + 4 > size:
            break
        marker = data[place + 1]
        if data[place] != 0xFF or marker == 0xDA:  # (Pillow passes over junk between segments)
            return place
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # fill byte or mark without length
            place += 1 if marker == 0xFF else 2
            continue
        place += 2 + ((data[place + 2] << 8) | data[place + 3])
    return size


def _png_chunks(data: bytes) -> bool:
    """Is every chunk whole, up to IEND?

    Raises:
        DataError: media_broken, if a checksum is wrong.
    """
    place, view = 8, memoryview(data)
    for _ in range(MOST_PIECES):
        if place + 12 > len(data):
            break
        size = int.from_bytes(data[place : place + 4], "big")
        kind, end = data[place + 4 : place + 8], place + 8 + size
        if end + 4 > len(data):
            return False
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise reject(
                "media_broken", f"PNG chunk {kind.decode('latin-1')!r} has a wrong checksum. Fetch the file again."
            )
        if kind == b"IEND":
            return True
        place = end + 4
    return False


def _named(error: DataError, name: str) -> DataError:
    code, _, message = str(error).partition(": ")
    return reject(code, f"{name}: {message}")
