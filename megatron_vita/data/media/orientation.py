"""The orientation of a picture, from its EXIF block or XMP packet.

Sources: TIFF 6.0 with EXIF 2.3, and what Pillow makes of blocks that break them.
"""

from __future__ import annotations

import re
import struct
import warnings

from PIL import Image

from megatron_vita.data.media.window import Window

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture lies."""

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def valid(orientation: int | None) -> int:
    """An orientation that stands in a header as one of 1 to 8; what is no such number turns nothing."""
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


def xmp_orientation(packet: bytes) -> int | None:
    """Orientation in an XMP packet; None if it says nothing."""
    match = _XMP_ORIENTATION.search(packet)
    return int(match[1]) if match else None


def exif_orientation(window: Window, place: int, size: int) -> int | None:
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
    except MemoryError:
        raise
    except Exception:  # damaged EXIF is no reason to refuse a picture
        return None
    return value if isinstance(value, int) else 0 if value is not None else None
