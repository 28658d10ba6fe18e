"""Taking frames out of a video, in this process. (`data/media/video/open.py` has it done in a process that may die.)

decord decodes where it is installed, PyAV otherwise, and PyAV also has a try at what decord cannot open. A folder of
pictures is a video too. Both decoders number the frames alike: by the packets of the first video stream, in the order
in which they are shown.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from megatron_vita.data.media.image import decode, read_image
from megatron_vita.data.media.names import FRAME_SUFFIXES, natural_key
from megatron_vita.data.media.video.clip import ShortError, Times, VideoFile
from megatron_vita.data.media.video.container import check_container
from megatron_vita.data.media.window import open_window
from megatron_vita.data.rejects import code_of, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import ConfigError, DataError

BACKENDS = ("auto", "decord", "pyav")

_MOST_FRAMES, _MOST_BYTES = 16, 256 << 20
"""Of a video, decoded and not yet made small, in memory at once."""
_LONGEST = 1e7
"""Seconds; what lies further from 0 (four months) is a decoder's mark for "not known"."""
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""What makes a frame upright, by its counter-clockwise angle in degrees."""
_CONTAINERS = "mov,matroska,avi,flv,asf,mpeg,mpegts,mpegvideo,ogg,gif,apng,m4v,h264,hevc,ivf,nut,dv,rm,mjpeg,wtv,mxf"
"""ffmpeg's names of the formats that are opened: such as hold the pictures themselves."""


class _Decord(VideoFile):
    """Seeks, so it is fast on long clips.

    decord 0.6 fails on the frames of some narrow videos (16, 24, 48, 72 pixels wide: it trips over its own line
    padding). `rescue` opens the clip with another decoder then.
    """

    def __init__(self, name: str, source: Any, rescue: Callable[[], VideoFile] | None = None) -> None:
        import decord

        self._rescue = rescue
        self._reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        total = len(self._reader)
        stamps = np.asarray(self._reader.get_frame_timestamp(range(total)) if total else [], dtype=np.float64)
        if (
            (stamps < 0) & (stamps > -_LONGEST)
        ).any():  # it counts the frames that an edit list cuts off, or not, as it happens to seek
            raise reject("video_broken", f"{name}: decord misnumbers clips that an edit list has cut. Use pyav.")
        super().__init__(name, _times(stamps.reshape(total, 2)[:, 0], self._reader.get_avg_fps()))

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        done, count = 0, 1  # the first by itself: it tells the size
        while done < len(numbers):
            try:
                frames = self._reader.get_batch(list(numbers[done : done + count])).asnumpy()
            except MemoryError:
                raise
            except Exception as error:  # decord raises its own DECORDError, RuntimeError or IndexError
                if self._rescue is not None:
                    with self._rescue() as other:
                        yield from other.read(numbers[done:])
                    return
                raise reject(
                    "video_broken", f"{self.name}: a frame cannot be decoded ({_first_line(error)})."
                ) from None
            done += len(frames)
            self.check_size(frames.shape[2], frames.shape[1])
            count = min(_MOST_FRAMES, max(1, _MOST_BYTES // frames[0].nbytes))
            yield from map(Image.fromarray, frames)


class _PyAv(VideoFile):
    """Plays the clip from its start: right whatever the container says about frame counts and key frames."""

    def __init__(self, name: str, source: Callable[[], Any]) -> None:
        self._source = source
        with self._open() as container:
            if not container.streams.video:
                raise reject("video_broken", f"{name}: no video stream in it.")
            stream = container.streams.video[0]
            shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            step, fps = float(stream.time_base or 1), float(stream.average_rate or 0)
        stamps = [np.nan if stamp is None else stamp * step for stamp in shown]
        super().__init__(name, _times(np.array(stamps, dtype=np.float64), fps))

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        with self._open() as container:
            yield from self._play(container, numbers)

    def _open(self) -> Any:
        import av

        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file,subfile"}
        return av.open(self._source(), container_options=options)

    def _play(self, container: Any, numbers: Sequence[int]) -> Iterator[Image.Image]:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        self.check_size(context.width, context.height)
        wanted, place = list(numbers), 0
        frames = enumerate(container.decode(stream))
        played = 0
        while place < len(wanted):
            try:
                number, frame = next(frames)
                picture = _upright(frame) if number == wanted[place] else None
            except StopIteration:
                break
            except MemoryError:
                raise
            except Exception as error:  # av.error.FFmpegError and its many children
                raise reject(
                    "video_broken", f"{self.name}: a frame cannot be decoded ({_first_line(error)})."
                ) from None
            played = number + 1
            while picture is not None and place < len(wanted) and wanted[place] == number:
                place += 1
                yield picture
        if place < len(wanted):
            raise ShortError(played)


class _Folder(VideoFile):
    """Pictures of a folder in order, one a second (ShareGPTVideo's: two a second)."""

    def __init__(self, name: str, files: Sequence[MediaFile]) -> None:
        self._files = files
        fps = 2.0 if "ShareGPTVideo" in name else 1.0
        super().__init__(name, np.arange(len(files)) / fps, fps)

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        return (decode(read_image(self._files[number])) for number in numbers)


def _frames_of(path: str) -> list[MediaFile]:
    """Pictures of a folder and its sub-folders in natural order."""
    root = os.path.realpath(path)
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")
    ]
    inside = [file for file in files if os.path.realpath(file).startswith(root + os.sep)]
    return [MediaFile(path=file) for file in sorted(inside, key=lambda file: natural_key(os.path.relpath(file, root)))]


def open_here(file: MediaFile, backend: str = "auto") -> VideoFile:
    """Open a video file, a region of one, video bytes, or a folder of frames, in this process.

    Args:
        file: where the clip lies.
        backend: `decord`, `pyav`, or `auto`: decord where it is installed and can open the file, else PyAV.

    Raises:
        DataError: media_missing, or video_broken if no decoder can read it.
        ConfigError: the named backend is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"video backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if file.frames:
        return _Folder(file.name, file.frames)
    if file.path is not None and os.path.isdir(file.path):
        return _Folder(file.path, _frames_of(file.path))
    with open_window(file) as window:
        try:
            check_container(window)
        except DataError as error:
            code, message = code_of(error)
            raise reject(code, f"{file.name}: {message}") from None
        size = window.size

    def source() -> Any:
        if file.data is not None:
            return io.BytesIO(file.data)
        path = os.path.abspath(file.path or "")
        # both decoders stand on ffmpeg, which reads a part of a file without being told twice
        return path if file.size is None else f"subfile,,start,{file.offset},end,{file.offset + size},,:{path}"

    pyav: Callable[[], VideoFile] = lambda: _PyAv(file.name, source)  # noqa: E731
    openers: list[Callable[[], VideoFile]] = []
    if backend == "decord":
        openers.append(lambda: _Decord(file.name, source()))
    elif backend == "auto" and _has_decord():
        openers.append(lambda: _Decord(file.name, source(), rescue=pyav))
    if backend != "decord":
        openers.append(pyav)
    reason: object = ""
    for opener in openers:
        try:
            return opener()
        except ImportError:
            package = "decord" if backend == "decord" else "av"
            raise ConfigError(f"video backend {backend} is not installed: pip install {package}") from None
        except DataError as error:
            reason = str(error).partition(": ")[2]
        except MemoryError:
            raise
        except Exception as error:  # both libraries have their own base errors
            reason = _first_line(error)
    raise reject("video_broken", f"{file.name}: no decoder can open it ({reason}). Fetch it again or drop the sample.")


@lru_cache(maxsize=1)
def _has_decord() -> bool:
    try:
        import decord
    except (ImportError, OSError):
        return False
    decord.logging.set_level(decord.logging.QUIET)
    return True


def _upright(frame: Any) -> Image.Image:
    """A frame of PyAV's as it is to be shown: a telephone held upright films lying pictures. (decord turns them.)"""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(round(frame.rotation) % 360)
    return picture if turn is None else picture.transpose(turn)


def _times(stamps: Times, fps: float) -> Times:
    """When each frame is shown, ascending; by the header's rate where the packets do not say it.

    What lies before time 0 is not shown: an edit list has cut it off, and it is there for the decoder's sake.
    """
    if len(stamps) and (np.abs(stamps) < _LONGEST).all():  # else some are marks for "not known", or NaN
        stamps = np.sort(stamps)
        return stamps[stamps >= 0] if (stamps >= 0).any() else stamps
    return np.arange(len(stamps), dtype=np.float64) / (fps if np.isfinite(fps) and fps > 0 else 25.0)


def _first_line(error: object) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
