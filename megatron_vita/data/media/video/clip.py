"""An opened video: samples its frames and encodes them as they are stored."""

from __future__ import annotations

import dataclasses
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import MAX_PIXELS
from megatron_vita.data.media.tiling import shrink_frame
from megatron_vita.data.rejects import reject
from megatron_vita.data.spec import PreprocessSpec

PNG_MOST_PIXELS = 64 * 64
"""Frames up to this size are stored as PNG (lossless, and so small no larger), larger ones as JPEG 95, full chroma."""
_ROUNDED = 0.01
"""Frames: many containers round times to milliseconds, and ten seconds must stay ten frames at one a second."""
_MILLISECOND = 1.001e-3

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class MissedError(Exception):
    """The decoder did not output an expected frame, or not at its time."""


class VideoFile(ABC):
    """An opened video; use it as a context manager."""

    def __init__(self, name: str, times: Times, fps: float | None = None) -> None:
        self.name = name
        """For messages."""
        self.set_times(times, fps)
        if self.total < 1:
            raise reject("video_broken", f"{name}: no frame in it.")

    def set_times(self, times: Times, fps: float | None = None) -> None:
        """Set the time at which each frame is shown, in seconds of any clock, ascending."""
        self.times = np.round(times - times[:1], 3)
        """Seconds into the clip at which each frame is shown, to the millisecond, float64 `[total]`."""
        self.total = len(times)
        """Frames of the clip."""
        self.fps = frame_rate(times) if fps is None else fps
        """Frames a second; 0 if that cannot be said."""

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  (nothing to close is a fine default)
        """Let go of the file."""

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        """Number of frames to sample: at most `max_frames`, and at most `spec.max_fps` a second, at least one."""
        if is_even(self.times):
            return count_frames(self.total, self.fps, max_frames, spec.max_fps)
        return max(1, min(len(thinned(self.times, spec.max_fps)), max_frames))

    def numbers(self, spec: PreprocessSpec, count: int) -> list[int]:
        """Numbers of the frames that `frames` takes if it takes `count`."""
        if is_even(self.times):
            return sample_frames(self.total, count)
        kept = thinned(self.times, spec.max_fps)
        return [int(kept[place]) for place in sample_frames(len(kept), min(count, len(kept)))]

    def times_of(self, spec: PreprocessSpec, count: int) -> list[float]:
        """When these frames are shown; seconds into the clip."""
        return [float(self.times[number]) for number in self.numbers(spec, count)]

    def frames(self, spec: PreprocessSpec, max_frames: int) -> list[MediaItem]:
        """The sampled frames as they are stored.

        Raises:
            DataError: video_broken, if any of them cannot be decoded.
        """
        try:
            return self._sampled(spec, self.count(spec, max_frames))
        except MissedError:
            self.learn()
            try:
                return self._sampled(spec, self.count(spec, max_frames))
            except MissedError:
                raise reject("video_broken", f"{self.name}: its frames come out differently each time.") from None

    def learn(self) -> None:
        """Decode the whole clip for its frames and their times, where the container is wrong about them.

        Raises:
            DataError: video_broken, where too few come out.
        """
        raise reject("video_broken", f"{self.name}: not all of its {self.total} frames can be decoded.")

    def _sampled(self, spec: PreprocessSpec, count: int) -> list[MediaItem]:
        numbers = self.numbers(spec, count)
        items = [encode_frame(shrink_frame(picture, spec)) for picture in self.read(numbers)]
        return [
            dataclasses.replace(item, time=float(self.times[number]))
            for item, number in zip(items, numbers, strict=True)
        ]

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Frames by number (ascending), RGB; few at a time, for thousands of full size would fill the memory.

        Raises:
            MissedError: `times` is wrong about the clip; `learn` corrects it.
        """

    def check_size(self, width: int, height: int) -> None:
        """Reject frames of enormous size.

        Raises:
            DataError: media_bomb.
        """
        if width * height > MAX_PIXELS:
            raise reject("media_bomb", f"{self.name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded.")


# ---------------------------------------------------------------------------------------- which frames are sampled


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
    return bool(np.abs(times - places).max() <= max(_MILLISECOND, (times[-1] - times[0]) / (len(times) - 1) / 2))


def thinned(times: Times, max_fps: float) -> Numbers:
    """Numbers of frames that are at least 1 / `max_fps` seconds apart, as many as there can be, the last one included.

    Of a clip of variable rate frames are sampled among these, so that a burst of frames yields no more than a still
    scene of the same length.
    """
    gap = 1 / max_fps - _MILLISECOND
    kept = [0]
    while (place := max(int(np.searchsorted(times, times[kept[-1]] + gap)), kept[-1] + 1)) < len(times):
        kept.append(place)
    kept[-1] = len(times) - 1 if len(kept) > 1 else len(times) // 2
    return np.array(kept, dtype=np.int64)


def encode_frame(picture: Image.Image) -> MediaItem:
    """A frame as an item of the shards."""
    buffer = io.BytesIO()
    if picture.width * picture.height <= PNG_MOST_PIXELS:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return MediaItem(buffer.getvalue(), picture.width, picture.height, frame=True)
