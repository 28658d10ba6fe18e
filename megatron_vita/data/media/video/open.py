"""Videos: opened once, asked how many frames they have to give, then for the frames.

Decoders are large programs that read strangers' files. They run in a child process with limits (`video_process.py`)
unless told otherwise; what they do there is in `video_decode.py`, and which frames are taken in `video_frames.py`.
"""

from __future__ import annotations

from megatron_vita.data.media.video.clip import VideoFile
from megatron_vita.data.media.video.decode import open_here
from megatron_vita.data.media.video.worker import ChildVideo, VideoLimits
from megatron_vita.data.sample import MediaFile

__all__ = ["VideoFile", "VideoLimits", "open_video"]

_DEFAULT = VideoLimits()


def open_video(file: MediaFile, backend: str = "auto", *, limits: VideoLimits | None = _DEFAULT) -> VideoFile:
    """Open a video file, a region of a file, video bytes, or a folder of frames.

    Args:
        file: where the clip lies.
        backend: `decord`, `pyav`, or `auto`: decord where it is installed and can open the file, else PyAV.
        limits: what decoding may cost in the child process; None decodes in this process, without limits, for files
            that one has made oneself.

    Returns:
        The video, to be used as a context manager. Its `frames` may raise video_timeout, video_memory and media_crash.

    Raises:
        DataError: media_missing; video_broken if no decoder can read it; video_timeout, video_memory or media_crash if
            opening it alone does that.
        ConfigError: the named backend is not installed.
    """
    return open_here(file, backend) if limits is None else ChildVideo(file, backend, limits)
