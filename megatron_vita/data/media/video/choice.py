"""Which frames of a clip are sampled, from the times at which they are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

MILLISECOND = 1.001e-3
"""Seconds by which times may be off, since many containers round them."""
_ROUNDED = 0.01
"""Frames: many containers round times to milliseconds, and ten seconds must stay ten frames at one a second."""


def count_frames(total: int, fps: float, max_frames: int, max_fps: float) -> int:
    """Frames taken of a clip of constant rate: at most `max_fps` a second, at most `max_frames`, at least one."""
    by_time = int(total * max_fps / fps + _ROUNDED) if fps > 0 else total
    return max(1, min(total, by_time, max_frames))


def sample_frames(total: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly over a clip of `total` frames, first and last included; ascending.

    One frame is the middle one.
    """
    if count == 1:
        return [total // 2]
    return [(2 * k * (total - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]


def frame_rate(times: Sequence[float] | Times) -> float:
    """Frames a second of a clip, from when each frame is shown; 0 if that says nothing.

    Headers name rates of their own, which decoders read differently; from the times all get the same.
    """
    span = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    return (len(times) - 1) / span if span > 0 else 0.0


def is_even(times: Times) -> bool:
    """Whether the clip has a constant rate: each time is within half a frame of that at the mean rate."""
    if len(times) < 3:
        return True
    places = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - places).max() <= max(MILLISECOND, (times[-1] - times[0]) / (len(times) - 1) / 2))


def thinned(times: Times, max_fps: float) -> Numbers:
    """Numbers of frames that are at least 1 / `max_fps` seconds apart, as many as there can be, the last one included.

    Of a clip of variable rate frames are sampled among these, so that a burst of frames yields no more than a still
    scene of the same length.
    """
    gap = 1 / max_fps - MILLISECOND
    kept = [0]
    while (place := max(int(np.searchsorted(times, times[kept[-1]] + gap)), kept[-1] + 1)) < len(times):
        kept.append(place)
    kept[-1] = len(times) - 1 if len(kept) > 1 else len(times) // 2
    return np.array(kept, dtype=np.int64)
