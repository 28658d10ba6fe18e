"""Videos: which frames are taken, and taking them.

decord decodes where it is installed, PyAV otherwise, and PyAV also has a try at what decord cannot open. A folder of
pictures is a video too.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vita.data.example import MediaItem
from megatron_vita.data.picture import MAX_PIXELS, decode, read_image
from megatron_vita.data.rejects import refuse
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.tiling import shrink_frame
from megatron_vita.errors import ConfigError, DataError

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
PNG_MOST_PIXELS = 64 * 64
"""Frames up to this size are stored as PNG (lossless, and so small no larger), larger ones as JPEG 95, full chroma."""

_MOST_FRAMES, _MOST_BYTES = 16, 256 << 20
"""Of a video, decoded and not yet made small, in memory at once."""
_CONTAINERS = "mov,matroska,avi,flv,asf,mpeg,mpegts,mpegvideo,ogg,gif,apng,m4v,h264,hevc,ivf,nut,dv,rm,mjpeg,wtv,mxf"
"""ffmpeg's names of the formats that are opened: such as hold the pictures themselves."""
_PLAYLISTS = (b"#EXT", b"ffconcat", b"<", b"v=0", b"[")
"""How playlists begin (HLS, concat, DASH, SDP): they name further files, and a dataset's must stay in its folder."""

Pixels = npt.NDArray[np.uint8]


def count_frames(total: int, fps: float, max_frames: int, max_fps: float) -> int:
    """How many frames of a clip are taken: at most `max_fps` a second, at most `max_frames`, at least one."""
    by_time = int(total * max_fps / fps + 1e-6) if fps > 0 else total
    return max(1, min(total, by_time, max_frames))


def sample_frames(total: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly over a clip of `total` frames, first and last included; ascending.

    One frame is the middle one.
    """
    if count == 1:
        return [total // 2]
    return [(2 * k * (total - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]


class VideoFile(ABC):
    """An opened video; use it as a context manager."""

    def __init__(self, name: str, total: int, fps: float) -> None:
        self.name = name
        """For messages."""
        self.total = total
        """Frames of the clip."""
        self.fps = fps
        """Frames a second."""
        if total < 1:
            raise refuse("video_broken", f"{name}: no frame in it.")

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  (nothing to close is a fine default)
        """Let go of the file."""

    def count(self, spec: PreprocessSpec, max_frames: int) -> int:
        """Frames that would be taken."""
        return count_frames(self.total, self.fps, max_frames, spec.max_fps)

    def frames(self, spec: PreprocessSpec, max_frames: int) -> list[MediaItem]:
        """The sampled frames as they are stored.

        Raises:
            DataError: video_broken, if any of them cannot be decoded.
        """
        wanted = sample_frames(self.total, self.count(spec, max_frames))
        return [encode_frame(shrink_frame(picture, spec)) for picture in self.read(wanted)]

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Frames by number (ascending), RGB; few at a time, for thousands of full size would fill the memory."""

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise refuse("media_bomb", f"{self.name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded.")


class _Decord(VideoFile):
    """Seeks, so it is fast on long clips.

    decord 0.6 fails on the frames of some narrow videos (16, 24, 48, 72 pixels wide: it trips over its own line
    padding). `rescue` opens the clip with another decoder then.
    """

    def __init__(self, name: str, source: Any, rescue: Callable[[], VideoFile] | None = None) -> None:
        import decord

        self._rescue = rescue
        self._reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        super().__init__(name, len(self._reader), float(self._reader.get_avg_fps()))

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        done, count = 0, 1  # the first by itself: it tells the size
        while done < len(numbers):
            try:
                frames = self._reader.get_batch(list(numbers[done : done + count])).asnumpy()
            except Exception as error:  # decord raises its own DECORDError, RuntimeError or IndexError
                if self._rescue is not None:
                    with self._rescue() as other:
                        yield from other.read(numbers[done:])
                    return
                raise refuse(
                    "video_broken", f"{self.name}: a frame cannot be decoded ({_first_line(error)})."
                ) from None
            done += len(frames)
            self._check_size(frames.shape[2], frames.shape[1])
            count = min(_MOST_FRAMES, max(1, _MOST_BYTES // frames[0].nbytes))
            yield from map(Image.fromarray, frames)


class _PyAv(VideoFile):
    """Plays the clip from its start: right whatever the container says about key frames."""

    def __init__(self, name: str, source: Any) -> None:
        import av

        self._container = av.open(source, container_options={"format_whitelist": _CONTAINERS})
        if not self._container.streams.video:
            raise refuse("video_broken", f"{name}: no video stream in it.")
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        total = self._stream.frames or sum(1 for packet in self._container.demux(self._stream) if packet.size)
        self._container.seek(0)
        super().__init__(name, total, float(self._stream.average_rate or 0))

    def close(self) -> None:
        self._container.close()

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        context = self._stream.codec_context
        self._check_size(context.width, context.height)
        wanted, place = list(numbers), 0
        frames = enumerate(self._container.decode(self._stream))
        played = 0
        while place < len(wanted):
            try:
                number, frame = next(frames)
                picture = Image.fromarray(frame.to_ndarray(format="rgb24")) if number == wanted[place] else None
            except StopIteration:
                break
            except Exception as error:  # av.error.FFmpegError and its many children
                raise refuse(
                    "video_broken", f"{self.name}: a frame cannot be decoded ({_first_line(error)})."
                ) from None
            played = number + 1
            while picture is not None and place < len(wanted) and wanted[place] == number:
                place += 1
                yield picture
        if place < len(wanted):
            raise refuse("video_broken", f"{self.name}: ends after {played} of {self.total} frames.")


class _Folder(VideoFile):
    """Pictures of a folder and its sub-folders in natural order, one a second."""

    def __init__(self, path: Path, fps: float = 1.0) -> None:
        root = os.path.realpath(path)
        files = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(root)
            for name in names
            if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")
        ]
        inside = [file for file in files if os.path.realpath(file).startswith(root + os.sep)]
        self._files = sorted(inside, key=lambda file: natural_key(os.path.relpath(file, root)))
        super().__init__(str(path), len(self._files), fps)

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        return (decode(read_image(MediaFile(path=self._files[number]))) for number in numbers)


def open_video(file: MediaFile, backend: str = "auto") -> VideoFile:
    """Open a video file, video bytes, or a folder of frames.

    Args:
        file: a path or bytes.
        backend: `decord`, `pyav`, or `auto`: decord where it is installed and can open the file, else PyAV.

    Raises:
        DataError: media_missing, or video_broken if no decoder can read it.
        ConfigError: the named backend is not installed.
    """
    if file.path is not None and os.path.isdir(file.path):
        return _Folder(Path(file.path))
    if file.path is not None and not os.path.isfile(file.path):
        raise refuse("media_missing", f"{file.path} does not exist.")
    if file.path is None and file.data is None:
        raise refuse("media_missing", "the record gives neither a path nor bytes.")
    name = file.path or "embedded video"

    def source() -> Any:
        return io.BytesIO(file.data) if file.data is not None else file.path

    if _head(file).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_PLAYLISTS):
        raise refuse("video_broken", f"{name}: a playlist of other files, no video. Give the video itself.")
    openers: dict[str, list[Callable[[], VideoFile]]] = {
        "decord": [lambda: _Decord(name, source())],
        "pyav": [lambda: _PyAv(name, source())],
        "auto": [lambda: _Decord(name, source(), rescue=lambda: open_video(file, "pyav"))] if _has_decord() else [],
    }
    openers["auto"] += openers["pyav"]
    if backend not in openers:
        raise ConfigError(f"video backend {backend!r}: choose auto, decord or pyav.")
    reason: object = ""
    for opener in openers[backend]:
        try:
            return opener()
        except ImportError:
            package = "decord" if backend == "decord" else "av"
            raise ConfigError(f"video backend {backend} is not installed: pip install {package}") from None
        except DataError as error:
            reason = str(error).partition(": ")[2]
        except Exception as error:  # both libraries have their own base errors
            reason = _first_line(error)
    raise refuse("video_broken", f"{name}: no decoder can open it ({reason}). Fetch it again or drop the sample.")


def _head(file: MediaFile) -> bytes:
    if file.data is not None:
        return file.data[:64]
    try:
        with open(file.path or "", "rb") as stream:
            return stream.read(64)
    except OSError as error:
        raise refuse("media_missing", f"{file.path} cannot be read ({error.strerror}).") from None


def encode_frame(picture: Image.Image) -> MediaItem:
    """A frame as an item of the shards."""
    buffer = io.BytesIO()
    if picture.width * picture.height <= PNG_MOST_PIXELS:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return MediaItem(buffer.getvalue(), picture.width, picture.height, frame=True)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `frame2` comes before `frame10`."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"([0-9]+)", name)]


@lru_cache(maxsize=1)
def _has_decord() -> bool:
    try:
        import decord
    except (ImportError, OSError):
        return False
    decord.logging.set_level(decord.logging.QUIET)
    return True


def _first_line(error: object) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
