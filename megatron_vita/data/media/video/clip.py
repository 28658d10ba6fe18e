"""An opened video: samples its frames and encodes them as they are stored."""

from __future__ import annotations

import dataclasses
import io
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import MAX_PIXELS
from megatron_vita.data.media.tiling import shrink_frame
from megatron_vita.data.media.video.choice import (
    MILLISECOND,
    Times,
    count_frames,
    frame_rate,
    is_even,
    sample_frames,
    thinned,
)
from megatron_vita.data.rejects import reject
from megatron_vita.data.spec import PreprocessSpec

PNG_MOST_PIXELS = 64 * 64
"""Frames up to this size are stored as PNG (lossless, and so small no larger), larger ones as JPEG 95, full chroma."""


class MissedError(Exception):
    """The decoder did not output an expected frame, or not at its time."""


class Reading:
    """A reading of a clip that goes on: further frames are asked for after the first have come."""

    def __init__(self, video: VideoFile) -> None:
        self._asked: deque[int] = deque()
        self._last = -1
        self._pictures = video.read(self._numbers())

    def reaches(self, number: int) -> bool:
        """Whether it has not passed a frame."""
        return number > self._last

    def pictures(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """The next frames.

        Raises:
            MissedError: as `VideoFile.read`, or there are fewer.
        """
        for number in numbers:
            self._asked.append(number)
            self._last = number
            picture = next(self._pictures, None)
            if picture is None:
                raise MissedError
            yield picture

    def _numbers(self) -> Iterator[int]:
        while True:
            yield self._asked.popleft()  # `read` asks for a number only when its frame is asked for


class VideoFile(ABC):
    """An opened video; use it as a context manager."""

    _reading: Reading | None = None
    _part: tuple[float, float | None] = (0.0, None)

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
        self._reading = None  # it was begun with other times

    def limit_to(self, start: float, end: float | None) -> VideoFile:
        """Sample frames of a part alone: those shown from `start` to `end` (in seconds, both included; None: the end).

        Numbers and times stay those of the whole clip.

        Raises:
            DataError: video_broken, if the part begins behind the last frame.
        """
        if (start, end) != (0.0, None):
            if not 0 <= start <= self.times[-1] + 1 / (self.fps or 1) or (end is not None and end < start):
                raise reject(
                    "video_broken",
                    f"{self.name}: seconds {start:g} to {'the end' if end is None else f'{end:g}'} are no part of it: "
                    f"its last frame is shown at {self.times[-1]:g}.",
                )
            self._part = (start, end)
        return self

    def _shown(self) -> tuple[int, Times, float]:
        """(number of the first frame of the part that is sampled, times of its frames, frames a second)."""
        start, end = self._part
        if (start, end) == (0.0, None):
            return 0, self.times, self.fps
        first = max(int(np.searchsorted(self.times, start + MILLISECOND, side="right")) - 1, 0)  # shown at `start`
        stop = self.total if end is None else int(np.searchsorted(self.times, end + MILLISECOND, side="right"))
        times = self.times[first : max(stop, first + 1)]
        return first, times, frame_rate(times)

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._reading = None

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        """Number of frames to sample: at most `max_frames`, and at most `spec.max_fps` a second, at least one."""
        _, times, fps = self._shown()
        if is_even(times):
            return count_frames(len(times), fps, max_frames, spec.max_fps)
        return max(1, min(len(thinned(times, spec.max_fps)), max_frames))

    def numbers(self, spec: PreprocessSpec, count: int) -> list[int]:
        """Numbers of the frames that `frames` takes if it takes `count`."""
        first, times, _ = self._shown()
        if is_even(times):
            return [first + number for number in sample_frames(len(times), count)]
        kept = thinned(times, spec.max_fps)
        return [first + int(kept[place]) for place in sample_frames(len(kept), min(count, len(kept)))]

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

    def plan(self, spec: PreprocessSpec, max_frames: int) -> list[int]:
        """Numbers of the frames that `frames` takes, known before they are read; `times` is right about them.

        Raises:
            DataError: video_broken, if too few frames can be decoded.
        """
        numbers = self.numbers(spec, self.count(spec, max_frames))
        try:
            self.prove(numbers)
        except MissedError:
            self.learn()
            numbers = self.numbers(spec, self.count(spec, max_frames))
        return numbers

    def frames_at(self, spec: PreprocessSpec, numbers: Sequence[int]) -> list[MediaItem]:
        """Frames by number (ascending) as `frames` gives them; few at a time, for they are all in memory.

        Decoding goes on behind the frames of the last call where that leads to these; else it begins anew.

        Raises:
            DataError: video_broken, if any of them cannot be decoded.
        """
        try:
            return self._window(spec, numbers)
        except MissedError:
            told = self.times[list(numbers)].tolist()
            self.learn()
            if max(numbers) >= self.total or self.times[list(numbers)].tolist() != told:
                raise reject(
                    "video_broken",
                    f"{self.name}: its frames do not stand where its container says. Convert it or drop the sample.",
                ) from None
            try:
                return self._window(spec, numbers)
            except MissedError:
                raise reject("video_broken", f"{self.name}: its frames come out differently each time.") from None

    def prove(self, numbers: Sequence[int]) -> None:  # noqa: B027  (most kinds of clip are right about their frames)
        """Check that `times` is right about the frames that are to be read, as cheaply as the container allows.

        Raises:
            MissedError: it is wrong; `learn` corrects it.
        """

    def learn(self) -> None:
        """Decode the whole clip for its frames and their times, where the container is wrong about them.

        Raises:
            DataError: video_broken, where too few come out.
        """
        raise reject("video_broken", f"{self.name}: not all of its {self.total} frames can be decoded.")

    def _window(self, spec: PreprocessSpec, numbers: Sequence[int]) -> list[MediaItem]:
        reading, self._reading = self._reading, None  # one that fails is of no further use
        if not numbers:
            return []
        if reading is None or not reading.reaches(numbers[0]):
            reading = Reading(self)
        items = self._encoded(spec, numbers, reading.pictures(numbers))
        self._reading = reading
        return items

    def _sampled(self, spec: PreprocessSpec, count: int) -> list[MediaItem]:
        numbers = self.numbers(spec, count)
        return self._encoded(spec, numbers, self.read(numbers))

    def _encoded(
        self, spec: PreprocessSpec, numbers: Sequence[int], pictures: Iterator[Image.Image]
    ) -> list[MediaItem]:
        items = [encode_frame(shrink_frame(picture, spec)) for picture in pictures]
        return [
            dataclasses.replace(item, time=float(self.times[number]))
            for item, number in zip(items, numbers, strict=True)
        ]

    @abstractmethod
    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        """Frames by number (ascending), RGB; few at a time, for thousands of full size would fill the memory.

        A number is taken from `numbers` only when its frame is asked for, so that a reading can go on later.

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


def encode_frame(picture: Image.Image) -> MediaItem:
    """A frame as an item of the shards."""
    buffer = io.BytesIO()
    if picture.width * picture.height <= PNG_MOST_PIXELS:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return MediaItem(buffer.getvalue(), picture.width, picture.height, frame=True)
