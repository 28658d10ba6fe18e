"""Opening a video in this process. (`open.py` has it done in a process that may die.)

PyAV decodes. A folder of pictures is a video too, and so is an animated WebP, which ffmpeg does not play.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from megatron_vita.data.media.image import MAX_BYTES, decode, open_picture, read_image, to_rgb
from megatron_vita.data.media.names import FRAME_SUFFIXES, NO_FRAMES, natural_key
from megatron_vita.data.media.video.clip import MissedError, VideoFile
from megatron_vita.data.media.video.container import check_container
from megatron_vita.data.media.video.pyav import PyAvVideo, first_line
from megatron_vita.data.media.window import open_window
from megatron_vita.data.rejects import code_of, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import ConfigError, DataError

BACKENDS = ("auto", "pyav", "decord")


class _Folder(VideoFile):
    """Pictures of a folder in order, as many a second as its dataset says."""

    def __init__(self, name: str, files: Sequence[MediaFile], fps: float) -> None:
        self._files = files
        super().__init__(name, np.arange(len(files)) / fps, fps)

    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        return (decode(read_image(self._files[number])) for number in numbers)


class _WebP(VideoFile):
    """An animated WebP, by Pillow."""

    def __init__(self, name: str, data: bytes) -> None:
        self._data = data
        durations, place = [], 12
        while place + 8 <= len(data):
            size = int.from_bytes(data[place + 4 : place + 8], "little")
            if data[place : place + 4] == b"ANMF":
                durations.append(int.from_bytes(data[place + 20 : place + 23], "little"))
            place += 8 + size + (size & 1)
        times = np.cumsum([0, *durations[:-1]]) / 1000
        super().__init__(name, times if np.all(np.diff(times) > 0) else np.arange(len(times)) / 10)

    def read(self, numbers: Iterable[int]) -> Iterator[Image.Image]:
        with open_picture(io.BytesIO(self._data)) as picture:
            self.check_size(*picture.size)
            frames, shown = enumerate(ImageSequence.Iterator(picture)), -1
            for number in numbers:
                while shown < number:
                    shown, _ = next(frames, (self.total, None))
                if shown == self.total:
                    raise MissedError
                yield to_rgb(picture)


def frames_of(path: str) -> list[MediaFile]:
    """Pictures of a folder and its sub-folders in natural order.

    Raises:
        DataError: video_broken, if one of them is no frame: a clip without it would be another clip.
    """
    root = os.path.realpath(path)
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if name[0] != "."]
    unread = sorted(file for file in found if file.lower().endswith(NO_FRAMES))
    if unread:
        name = os.path.relpath(unread[0], root)
        raise reject("video_broken", f"{path}: {name} is no frame that can be read. Convert it, or take it out.")
    files = [file for file in found if file.lower().endswith(FRAME_SUFFIXES)]
    inside = [file for file in files if os.path.realpath(file).startswith(root + os.sep)]
    return [MediaFile(path=file) for file in sorted(inside, key=lambda file: natural_key(os.path.relpath(file, root)))]


def open_here(file: MediaFile, backend: str = "auto") -> VideoFile:
    """Open a video file, a region of one, video bytes, or a folder of frames, or a part of these, in this process.

    Args:
        file: where the clip lies.
        backend: see `open_video`.

    Raises:
        DataError: media_missing, video_codec, video_inexact, or video_broken if it cannot be read.
        ConfigError: the named backend is not installed.
    """
    _check_backend(backend)
    return _open(file, backend).limit_to(file.start, file.end)


def _open(file: MediaFile, backend: str) -> VideoFile:
    if file.frames:
        return _Folder(file.name, file.frames, file.frame_rate)
    if file.path is not None and os.path.isdir(file.path):
        return _Folder(file.name, frames_of(file.path), file.frame_rate)
    with open_window(file) as window:
        try:
            check_container(window)
        except DataError as error:
            code, message = code_of(error)
            raise reject(code, f"{file.name}: {message}") from None
        size = window.size
        animation = window.head[:4] == b"RIFF" and window.head[8:12] == b"WEBP"
        data = window.read(0, size) if animation and size <= MAX_BYTES else None

    def source() -> Any:
        if file.data is not None:
            return io.BytesIO(file.data)
        path = os.path.abspath(file.path or "")
        # ffmpeg itself can read a part of a file
        return path if file.size is None else f"subfile,,start,{file.offset},end,{file.offset + size},,:{path}"

    try:
        if data is not None:
            return _WebP(file.name, data)
        return _opener(backend)(file.name, source)
    except ImportError:
        package = "decord" if backend == "decord" else "av"
        raise ConfigError(f"video backend {backend} is not installed: pip install {package}") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # both libraries have their own base errors
        raise reject(
            "video_broken",
            f"{file.name}: no decoder can open it ({first_line(error)}). Fetch it again or drop the sample.",
        ) from None


def _opener(backend: str) -> Callable[[str, Callable[[], Any]], VideoFile]:
    if backend != "decord":
        return PyAvVideo
    from megatron_vita.data.media.video.decord import DecordVideo

    return DecordVideo


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"video backend {backend!r}: choose one of {', '.join(BACKENDS)}.")


def decoder_name(backend: str) -> str:
    """Name and version of the decoder, on which the pixels of frames depend.

    Raises:
        ConfigError: it is not known, or not installed.
    """
    _check_backend(backend)
    try:
        import av

        libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
        name = f"pyav {av.__version__} (libavcodec {libavcodec})"
        if backend != "decord":
            return name
        import decord

        return f"decord {decord.__version__}, proven by {name}"
    except ImportError as error:
        raise ConfigError(f"video backend {backend} is not installed: pip install {error.name}") from None
