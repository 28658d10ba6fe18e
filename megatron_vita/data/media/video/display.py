"""Shows a decoded frame as a player does: crops it, makes pixels square, turns and flips it, lays it on white."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.media.image import MAX_PIXELS, to_rgb
from megatron_vita.data.rejects import reject

_CROPPING = re.compile(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)")
_ONE = 1 << 16
"""In a display matrix, whose numbers are 16.16 fixed point (ISO/IEC 14496-12)."""


class Display:
    """How the frames of one stream are shown."""

    def __init__(self, description: str, aspect: Fraction | None) -> None:
        """What the container asks for.

        Args:
            description: ffmpeg's of the stream, which tells how the container crops.
            aspect: width of a pixel over its height.
        """
        found = _CROPPING.search(description)
        self._crop = tuple(map(int, found.groups())) if found else (0, 0, 0, 0)
        self._aspect = float(aspect) if aspect else 1.0

    def show(self, frame: Any) -> Image.Image:
        """A frame of PyAV's as an upright picture, RGB.

        Raises:
            DataError: media_bomb, if pixels so wide or high make an enormous picture.
        """
        import av

        single = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}  # before, there were no others
        alpha = any(component.is_alpha for component in frame.format.components)
        pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24", **single)
        left, right, top, bottom = self._crop
        if left + right < pixels.shape[1] and top + bottom < pixels.shape[0]:
            pixels = pixels[top : pixels.shape[0] - bottom, left : pixels.shape[1] - right]
        height, width = pixels.shape[:2]
        wide = max(1, round(width * self._aspect))
        if wide * height > MAX_PIXELS:
            raise reject(
                "media_bomb", f"a frame is shown with {wide} x {height} pixels; at most {MAX_PIXELS} are made."
            )
        picture = to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))
        if wide != width:
            picture = picture.resize((wide, height), Image.Resampling.BICUBIC)
        matrix = _matrix(frame)
        if matrix is None:
            return picture
        return Image.fromarray(np.ascontiguousarray(turned(np.asarray(picture), *matrix)))


def turned(pixels: npt.NDArray[np.uint8], a: int, b: int, c: int, d: int) -> npt.NDArray[np.uint8]:
    """Pixels turned by a display matrix: x' = a x + c y, y' = b x + d y. Angles between the right ones turn nothing."""
    if abs(a) == abs(d) == _ONE and not b and not c:
        across, down = a < 0, d < 0
    elif abs(b) == abs(c) == _ONE and not a and not d:
        pixels, across, down = pixels.transpose(1, 0, 2), c < 0, b < 0
    else:
        return pixels
    return pixels[:: -1 if down else 1, :: -1 if across else 1]


def _matrix(frame: Any) -> tuple[int, int, int, int] | None:
    from av.sidedata import sidedata

    container: Any = sidedata.SideDataContainer  # whose type stub leaves its argument out
    try:  # `frame.side_data` would refer to the frame and the frame to it, so that its pixels stayed for a while
        block = container(frame).get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data that this PyAV has no name for
        return None
    if block is None or len(bytes(block)) != 36:
        return None
    a, b, _, c, d, *_ = np.frombuffer(block, dtype=np.int32).tolist()
    return a, b, c, d
