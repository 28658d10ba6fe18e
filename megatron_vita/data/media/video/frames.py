"""Which frames of a clip are taken: index arithmetic, and how many of them a sequence still holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_ROUNDED = 0.01
"""Frames: many containers round times to milliseconds, and ten seconds must stay ten frames at one a second."""


def count_frames(total: int, fps: float, max_frames: int, max_fps: float) -> int:
    """How many frames of a clip are taken: at most `max_fps` a second, at most `max_frames`, at least one."""
    by_time = int(total * max_fps / fps + _ROUNDED) if fps > 0 else total
    return max(1, min(total, by_time, max_frames))


def sample_frames(total: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly over a clip of `total` frames, first and last included; ascending.

    One frame is the middle one.
    """
    if count == 1:
        return [total // 2]
    return [(2 * k * (total - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]


def frame_rate(times: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Frames a second of a clip, from when each frame is shown; 0 if that says nothing.

    Headers name rates of their own, which decoders read differently; from the times all get the same.
    """
    span = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    return (len(times) - 1) / span if span > 0 else 0.0


def most_that_fit(most: int, room: int, length: Callable[[int], int]) -> int:
    """The largest number of frames up to `most` whose `length` (in tokens) is at most `room`; 0 if none is.

    Args:
        most: frames that would be taken at best.
        room: tokens there are.
        length: tokens of so many frames; a frame more is many tokens more.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if length(middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low
