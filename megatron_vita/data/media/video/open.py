"""Opens videos: an opened video first returns its number of frames, then the frames.

Decoders are large programs that read strangers' files. They run in a child process with limits (`worker.py`, and
`child.py` inside it) by default; `decode.py` opens and decodes, `clip.py` chooses the frames.
"""

from __future__ import annotations

from megatron_vita.data.media.video.child_video import ChildVideo
from megatron_vita.data.media.video.clip import VideoFile
from megatron_vita.data.media.video.decode import BACKENDS, decoder_name, open_here
from megatron_vita.data.media.video.worker import VideoLimits
from megatron_vita.data.sample import MediaFile

__all__ = ["BACKENDS", "VideoFile", "VideoLimits", "decoder_name", "open_video"]

_DEFAULT = VideoLimits()


def open_video(file: MediaFile, backend: str = "auto", *, limits: VideoLimits | None = _DEFAULT) -> VideoFile:
    """Open a video file, a region of a file, video bytes, or a folder of frames.

    Args:
        file: where the clip lies.
        backend: `pyav`; `auto`: the fastest decoder that is proven to give the frames asked for, which is PyAV, since
            proving decord takes a decoding by PyAV; `decord`: decord, whose frames are compared with PyAV's.
        limits: what decoding may cost in the child process; None decodes in this process, without limits, for files
            that one has made oneself.

    Returns:
        The video, to be used as a context manager. Its `frames` may raise video_timeout, video_memory and media_crash.

    Raises:
        DataError: media_missing; video_codec, if there is no decoder; video_broken, if it cannot be read;
            video_inexact, if decord gives other frames; video_timeout, video_memory or media_crash if opening it alone
            does that.
        ConfigError: the named backend is not installed.
    """
    return open_here(file, backend) if limits is None else ChildVideo(file, backend, limits)
