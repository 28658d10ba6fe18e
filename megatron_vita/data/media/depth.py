"""Converts values deeper than 8 bits to pixels: 12 and 16 bits, 32-bit integers, floating point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.rejects import reject

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""TIFF tags."""
_SIGNED = 2
_ROWS = 256
"""Of a picture, that are scaled at once."""


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture has one value a pixel, of more than 8 bits or signed."""
    return picture.mode.startswith("I") or picture.mode == "F" or _is_signed_byte(picture)


def to_grey(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Such a picture's values as grey pixels.

    * Unsigned values of 12 or 16 bits: their largest possible value is white.
    * Floating point, none outside 0..1: 1 is white.
    * Whole numbers in 0..255, in 32 bits or in floating point: they are the pixels.
    * All else (depth maps, heights, radiance): the smallest value is black, the largest white, with even steps between;
      a picture of one value is mid-grey.

    A TIFF whose smallest value means white (WhiteIsZero) is then inverted.

    Returns:
        uint8 `[height, width]`.

    Raises:
        DataError: media_broken, if a value is NaN or infinite.
    """
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture)
    if _is_signed_byte(picture):
        values = values.view(np.int8)
    elif picture.mode == "I" and picture.format == "TIFF" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)
    elif picture.mode == "F" and picture.info.get("scale", 1.0) != 1.0:  # of a PFM
        values = values * np.float32(picture.info["scale"])
    if not np.isfinite(values).all():
        raise reject("media_broken", "some of its pixels are NaN or infinite. Replace them, or drop the sample.")
    low, high = _range(values, picture)
    grey = np.full(values.shape, 128, np.uint8)
    if low < high:
        for start in range(0, len(values), _ROWS):
            part = (values[start : start + _ROWS].astype(np.float64) - low) * (255.0 / (high - low))
            grey[start : start + _ROWS] = np.clip(np.rint(part), 0, 255)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if isinstance(clear := picture.info.get("transparency"), int):
        grey[values == clear] = 255  # laid on white
    return grey


def _range(values: npt.NDArray[Any], picture: Image.Image) -> tuple[float, float]:
    """The values of black and white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        bits = getattr(picture, "tag_v2", {}).get(_BITS, (16,))[0]
        return 0.0, float((1 << bits) - 1)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F" and low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and high <= 255 and bool((values == np.rint(values)).all()):
        return 0.0, 255.0
    return low, high


def _is_signed_byte(picture: Image.Image) -> bool:
    tags = getattr(picture, "tag_v2", None)
    return picture.mode == "L" and tags is not None and tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
