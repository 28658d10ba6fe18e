"""Pictures and videos whose tiles are decoded on demand: a picture at once, a video window by window.

A medium is opened for its sizes and frames alone; no pixel or encoded frame is kept beyond what was asked for. Files
that change in between are named as such.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import MediaItem, TileSlot
from megatron_vita.data.media.image import PictureHeader, read_image
from megatron_vita.data.media.tiling import PictureTiles, render_tiles
from megatron_vita.data.media.video.decode import frames_of
from megatron_vita.data.media.video.open import VideoFile, VideoLimits, open_video
from megatron_vita.data.media.window import open_window
from megatron_vita.data.rejects import code_of, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from megatron_vita.files import SHA256, new_digest

_FRAMES = 16
"""Frames of a video that are asked of its decoder at once."""
_LIMITS = VideoLimits()
_BLOCK = 1 << 20
"""Bytes of a file that are hashed at once."""


class Medium(ABC):
    """A picture or a video of a prompt."""

    items: list[MediaItem]
    """What it is to `build_example`, without bytes."""

    def __init__(self, file: MediaFile) -> None:
        """`file`: where it lies."""
        self.file = file
        self._stamps: dict[str, tuple[int, int] | None] = {}

    @abstractmethod
    def render(self, slots: Sequence[TileSlot], first_media: int, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
        """Pixels of some of its tiles (ascending), uint8 `[len(slots), 3, S, S]`.

        Args:
            slots: the tiles.
            first_media: index of `items[0]` in the Example.
            spec: tile size and layout.

        Raises:
            DataError: it cannot be decoded, or changed on disk.
        """

    @abstractmethod
    def digests(self) -> list[bytes]:
        """Of what decides the pixels of each of `items`, besides the spec: SHA-256 of the content, and for a frame of
        its number, too."""

    @abstractmethod
    def release(self) -> None:
        """Free what decoding holds."""

    @contextmanager
    def _unchanged(self, files: Sequence[MediaFile]) -> Iterator[None]:
        """Raise a DataError where files are not, before or after what is done, what they were the first time."""
        self._compare(files)
        try:
            yield
        except DataError:
            self._compare(files)  # which says more than that it cannot be decoded
            raise
        self._compare(files)

    def _compare(self, files: Sequence[MediaFile]) -> None:
        for file in files:
            if file.path is not None:
                stamp = _stamp(file.path)
                if self._stamps.setdefault(file.path, stamp) != stamp:
                    raise self._changed(file)

    def _changed(self, file: MediaFile) -> DataError:
        return reject("media_changed", f"{file.name} changed on disk after its prompt was laid out. Ask again.")


class Picture(Medium):
    """A picture, decoded once while its tiles are asked for one after the other."""

    def __init__(self, file: MediaFile, *, check: Callable[[PictureHeader], None] | None = None) -> None:
        """Read its header.

        Args:
            file: where it lies.
            check: see `read_image`.

        Raises:
            DataError: see `read_image`.
        """
        super().__init__(file)
        with self._unchanged([file]):
            item = read_image(file, check=check)
        self.items = [MediaItem(b"", item.width, item.height, max_tiles=item.max_tiles)]
        self._tiles: PictureTiles | None = None

    def render(self, slots: Sequence[TileSlot], first_media: int, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
        with self._unchanged([self.file]):
            if self._tiles is None:
                item = read_image(self.file)
                if (item.width, item.height) != (self.items[0].width, self.items[0].height):
                    raise self._changed(self.file)
                try:
                    self._tiles = PictureTiles(item, spec)
                except DataError as error:
                    code, message = code_of(error)
                    raise reject(code, f"{self.file.name}: {message}") from None
                except MemoryError:
                    raise reject(
                        "media_bomb", f"{self.file.name}: decoding it asks for more memory than there is."
                    ) from None
            return self._tiles.render(slots)

    def digests(self) -> list[bytes]:
        with self._unchanged([self.file]):
            return [_digest(b"picture", _content(self.file))]

    def release(self) -> None:
        self._tiles = None


class Video(Medium):
    """A video, whose decoding goes on where the tiles asked for last ended."""

    def __init__(
        self,
        file: MediaFile,
        spec: PreprocessSpec,
        backend: str,
        *,
        proven: bool,
        check: Callable[[VideoFile], None] | None = None,
        limits: VideoLimits = _LIMITS,
    ) -> None:
        """Choose its frames.

        Args:
            file: where it lies.
            spec: frames a second and most frames.
            backend: see `open_video`.
            proven: decode as many frames as it takes to be sure of all; else the container is believed.
            check: is called with the opened video before a frame of it is decoded; what it raises is raised.
            limits: of decoding.

        Raises:
            DataError: see `open_video`.
        """
        super().__init__(file)
        with self._unchanged([file]):
            self._video = open_video(file, backend, limits=limits)
            try:
                if check is not None:
                    check(self._video)
                most = spec.max_frames
                self._numbers = (
                    self._video.plan(spec, most) if proven else self._video.numbers(spec, self._video.count(spec, most))
                )
                folder = file.path is not None and os.path.isdir(file.path)
                self._frames = frames_of(str(file.path)) if folder else file.frames
                if folder and len(self._frames) != self._video.total:
                    raise self._changed(file)
            except BaseException:
                self._video.close()
                raise
        times = self._video.times
        self.items = [MediaItem(b"", 1, 1, frame=True, time=float(times[number])) for number in self._numbers]
        self._compare(self._files(0, len(self.items)))

    def _files(self, start: int, stop: int) -> list[MediaFile]:
        """What sampled frames are read from."""
        return [self.file, *(self._frames[number] for number in self._numbers[start:stop] if self._frames)]

    def render(self, slots: Sequence[TileSlot], first_media: int, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
        out = []
        for done in range(0, len(slots), _FRAMES):
            window = slots[done : done + _FRAMES]
            start, stop = window[0].media - first_media, window[-1].media + 1 - first_media
            with self._unchanged(self._files(start, stop)):
                items = self._video.frames_at(spec, self._numbers[start:stop])
                if [item.time for item in items] != [item.time for item in self.items[start:stop]]:
                    raise self._changed(self.file)
            out += [render_tiles(item, [slot], spec) for item, slot in zip(items, window, strict=True)]
        return np.concatenate(out)

    def digests(self) -> list[bytes]:
        files = self._files(0, len(self.items))
        with self._unchanged(files):
            contents = [_content(file) for file in files[1:]] or [_content(self.file)] * len(self.items)
        numbers = (number.to_bytes(8, "little") for number in self._numbers)
        return [_digest(b"frame", content, number) for content, number in zip(contents, numbers, strict=True)]

    def release(self) -> None:
        self._video.close()


def _stamp(path: str) -> tuple[int, int] | None:
    """(bytes, time of the last change in nanoseconds) of a file or folder; None if it is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _content(file: MediaFile) -> bytes:
    """SHA-256 of a medium's bytes."""
    digest = new_digest(SHA256)
    with open_window(file) as window:
        for place in range(0, window.size, _BLOCK):
            digest.update(window.read(place, _BLOCK))
    return bytes.fromhex(digest.hexdigest())


def _digest(*parts: bytes) -> bytes:
    digest = new_digest(SHA256)
    for part in parts:
        digest.update(part)
    return bytes.fromhex(digest.hexdigest())
