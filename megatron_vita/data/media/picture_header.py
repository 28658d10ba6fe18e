"""A picture's format and upright size from its header, without decoding a pixel.

Plain JPEG, PNG, WebP, GIF and BMP files are parsed by `picture_formats.py`; what is not plain (damaged, exotic, TIFF,
PPM) Pillow decides, so the two cannot disagree: `tests/data/media/test_picture_header.py` holds them together.
"""

from __future__ import annotations

import importlib
import struct
import warnings
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError

from megatron_vita.data.media.orientation import ORIENTATION
from megatron_vita.data.media.picture_formats import NotPlainError, parse_plain
from megatron_vita.data.media.window import Window, open_window
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Others that Pillow knows run programs or open further files."""
MAX_PIXELS = 89_478_485
"""Larger pictures are refused unread (Pillow's own bound: 256 MiB as RGB)."""
_MOST_HEADER = 8 << 20
"""Bytes in which Pillow must find a header that is not plain: it goes through junk byte by byte."""

Image.preinit()
for _plugin in ("TiffImagePlugin", "WebPImagePlugin"):  # Pillow knows only the commonest formats until it is told
    importlib.import_module(f"PIL.{_plugin}")

# Pillow warns between once and twice its bound and we refuse there, so the warning would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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
        raise reject("media_broken", "the file is empty.")
    try:
        kind, width, height, orientation = parse_plain(window)
    except (NotPlainError, IndexError, struct.error):  # what is not there ends the parsing as what is odd does
        kind, width, height, orientation = _ask_pillow(window)
    # Pillow turns a TIFF itself, and tells the size of the turned picture
    turned = orientation >= 5 and kind != "TIFF"
    check_size(width, height)
    return PictureHeader(kind, height if turned else width, width if turned else height, orientation)


def check_size(width: int, height: int) -> None:
    """Refuse what has no area, or too many pixels to decode.

    Raises:
        DataError: media_bomb or media_size.
    """
    if width < 1 or height < 1:
        raise reject("media_size", f"{width} x {height} pixels make no picture.")
    if width * height > MAX_PIXELS:
        raise reject("media_bomb", f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded.")


def open_picture(stream: IO[bytes]) -> Image.Image:
    """Pillow's picture of a stream, not decoded yet; size and format are checked.

    Raises:
        DataError: media_broken, media_bomb or media_size.
        MemoryError: its header asks for more memory than there is.
    """
    try:
        picture = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise reject("media_broken", f"not a picture in one of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise reject("media_bomb", f"{error}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged header
        raise reject("media_broken", f"the header cannot be read ({error}).") from None
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
        except MemoryError:
            raise
        except Exception:  # damaged EXIF is no reason to refuse a picture: viewers show it as it lies
            value = 1
        return kind, *picture.size, value if isinstance(value, int) and 1 <= value <= 8 else 1
