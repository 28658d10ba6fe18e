"""A video that has been opened: how many frames it has to give, and the frames as they are stored."""

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
from megatron_vita.data.media.video.frames import count_frames, frame_rate, sample_frames
from megatron_vita.data.rejects import reject
from megatron_vita.data.spec import PreprocessSpec

PNG_MOST_PIXELS = 64 * 64
"""Frames up to this size are stored as PNG (lossless, and so small no larger), larger ones as JPEG 95, full chroma."""
_LEAST_PLAYED = 0.9
"""Share of a clip's frames that must come out: a recording may begin or end between two key frames."""

Times = npt.NDArray[np.float64]


class ShortError(Exception):
    """Fewer frames came out of the decoder than the container has packets."""

    def __init__(self, played: int) -> None:
        self.played = played


class VideoFile(ABC):
    """An opened video; use it as a context manager."""

    def __init__(self, name: str, times: Times, fps: float | None = None) -> None:
        self.name = name
        """For messages."""
        self.times = np.round(times - times[:1], 3)
        """Seconds into the clip at which each frame is shown, to the millisecond, float64 `[total]`."""
        self.total = len(times)
        """Frames of the clip."""
        self.fps = frame_rate(times) if fps is None else fps
        """Frames a second; 0 if that cannot be said."""
        if self.total < 1:
            raise reject("video_broken", f"{name}: no frame in it.")

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  (nothing to close is a fine default)
        """Let go of the file."""

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        """Frames that would be taken."""
        return count_frames(self.total, self.fps, max_frames, spec.max_fps)

    def times_of(self, count: int) -> list[float]:
        """When the frames are shown that `frames` takes if it takes `count`; seconds into the clip."""
        return [float(self.times[number]) for number in sample_frames(self.total, count)]

    def frames(self, spec: PreprocessSpec, max_frames: int) -> list[MediaItem]:
        """The sampled frames as they are stored.

        Raises:
            DataError: video_broken, if any of them cannot be decoded.
        """
        try:
            return self._sampled(spec, self.count(spec, max_frames))
        except ShortError as error:
            if error.played < _LEAST_PLAYED * self.total:
                raise reject(
                    "video_broken", f"{self.name}: only {error.played} of {self.total} frames can be decoded."
                ) from None
            self.times, self.total = self.times[: error.played], error.played
            return self._sampled(spec, self.count(spec, max_frames))

    def _sampled(self, spec: PreprocessSpec, count: int) -> list[MediaItem]:
        pictures = self.read(sample_frames(self.total, count))
        items = (encode_frame(shrink_frame(picture, spec)) for picture in pictures)
        return [dataclasses.replace(item, time=time) for item, time in zip(items, self.times_of(count), strict=True)]

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Frames by number (ascending), RGB; few at a time, for thousands of full size would fill the memory."""

    def check_size(self, width: int, height: int) -> None:
        """Refuse frames of enormous size.

        Raises:
            DataError: media_bomb.
        """
        if width * height > MAX_PIXELS:
            raise reject("media_bomb", f"{self.name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded.")


def encode_frame(picture: Image.Image) -> MediaItem:
    """A frame as an item of the shards."""
    buffer = io.BytesIO()
    if picture.width * picture.height <= PNG_MOST_PIXELS:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return MediaItem(buffer.getvalue(), picture.width, picture.height, frame=True)
