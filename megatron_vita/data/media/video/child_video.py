"""A video that the child process decodes; it is opened again where another clip has taken the child along."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.video.child import Reply
from megatron_vita.data.media.video.choice import Times
from megatron_vita.data.media.video.clip import VideoFile
from megatron_vita.data.media.video.worker import VideoLimits, decoder
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError

_numbers = itertools.count()


class ChildVideo(VideoFile):
    """A video that the child decodes."""

    def __init__(self, file: MediaFile, backend: str, limits: VideoLimits) -> None:
        """Open it there.

        Raises:
            DataError: see `open_video`.
            ConfigError: the backend is not installed, or the child does not start.
        """
        self._file, self._backend, self._limits = file, backend, limits
        self._number, self._spent, self._where = next(_numbers), 0.0, 0
        self._planned: dict[str, Any] | None = None
        self._last = -1
        super().__init__(file.name, *self._open_there())
        self.limit_to(file.start, file.end)

    def frames(self, spec: PreprocessSpec, max_frames: int) -> list[MediaItem]:
        """See `VideoFile.frames`.

        Raises:
            DataError: also video_timeout, video_memory and media_crash.
        """
        return self._items(spec, max_frames=max_frames)

    def plan(self, spec: PreprocessSpec, max_frames: int) -> list[int]:
        """See `VideoFile.plan`.

        Raises:
            DataError: also video_timeout, video_memory and media_crash.
        """
        self._reopen()
        self._planned = {"do": "plan", "spec": spec.to_dict(), "max_frames": max_frames}
        numbers = self._plan(self._planned)
        self._spent = 0.0  # the limit is on one pass through the clip, and reading the frames is another
        return numbers

    def frames_at(self, spec: PreprocessSpec, numbers: Sequence[int]) -> list[MediaItem]:
        """See `VideoFile.frames_at`.

        Raises:
            DataError: also video_timeout, video_memory and media_crash.
        """
        if not numbers:
            return []
        if numbers[0] <= self._last:
            self._spent = 0.0  # a new pass
        self._last = numbers[-1]
        return self._items(spec, numbers=[int(number) for number in numbers])

    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        """Not supported: pixels of full size stay in the child."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file."""
        if self._where == decoder.started and self._where:
            self._where = 0
            try:
                decoder.ask(self._file.name, self._limits, 10.0, {"do": "close", "video": self._number})
            except DataError:
                return  # nobody waits for this clip any more
            decoder.tidy(self._limits)

    def _items(
        self, spec: PreprocessSpec, *, max_frames: int = 0, numbers: Sequence[int] | None = None
    ) -> list[MediaItem]:
        self._reopen()
        request = {"do": "frames", "spec": spec.to_dict(), "max_frames": max_frames, "numbers": numbers}
        answer, blobs = self._ask(request)
        return [
            MediaItem(data, int(width), int(height), frame=True, time=float(when))
            for (width, height, when), data in zip(answer["items"], blobs, strict=True)
        ]

    def _plan(self, request: dict[str, Any]) -> list[int]:
        answer, blobs = self._ask(request)
        self.set_times(np.frombuffer(blobs[0], dtype="<f8"), float(answer["fps"]))
        return [int(number) for number in answer["numbers"]]

    def _reopen(self) -> None:
        decoder.child(self._limits)
        if self._where == decoder.started:
            return
        times, _ = self._open_there()
        if self._planned is not None and not np.array_equal(times, self.times):
            self._plan(self._planned)  # the container is wrong about its frames: what was learnt there is lost

    def _open_there(self) -> tuple[Times, float]:
        file = self._file
        decoder.child(self._limits)  # starting it does not count
        places = [
            {"path": None if one.path is None else os.path.abspath(one.path), "offset": one.offset, "size": one.size}
            for one in (file, *file.frames)
        ]
        message: dict[str, Any] = {"do": "open", **places[0], "frames": places[1:], "backend": self._backend}
        message |= {"frame_rate": file.frame_rate, "start": file.start, "end": file.end}
        answer, blobs = self._ask(message, [one.data for one in (file, *file.frames) if one.data is not None])
        self._where = decoder.started
        return np.frombuffer(blobs[0], dtype="<f8"), float(answer["fps"])

    def _ask(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> Reply:
        start = time.monotonic()
        left = max(0.001, self._limits.timeout - self._spent)
        try:
            return decoder.ask(self._file.name, self._limits, left, {**message, "video": self._number}, blobs)
        finally:
            self._spent += time.monotonic() - start
