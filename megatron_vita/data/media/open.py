"""The media of a Sample: where they may lie, and all of them at once."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import read_image
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec


def safe_path(root: Path, path: str) -> Path:
    """A path of a dataset inside its media root, links resolved.

    Args:
        root: nothing outside it is read.
        path: relative to the root, or absolute but inside it.

    Raises:
        DataError: path_escape or media_missing.
    """
    found = locate(os.path.realpath(root), path)
    if found is None:
        raise reject("media_missing", f"{path} does not exist under {root}. Set `media_root`, or fetch the file.")
    return Path(found)


def locate(root: str, path: str) -> str | None:
    """As `safe_path`, but None where nothing is there.

    Args:
        root: the media root, its own links resolved.
        path: relative to the root, or absolute but inside it.

    Raises:
        DataError: path_escape, or media_missing for what can be no file name.
    """
    try:
        if "\0" in path or not os.fsencode(path):
            raise ValueError
    except ValueError:  # a lone surrogate, as JSON can write it, included
        raise reject("media_missing", f"{path!r} is not a file name.") from None
    real = os.path.realpath(os.path.join(root, path))
    if not (real + os.sep).startswith(root.rstrip(os.sep) + os.sep):
        raise reject(
            "path_escape", f"{path} leaves the media root {root}. Set `media_root` to the folder that holds it."
        )
    return real if os.path.exists(real) else None


def read_items(
    sample: Sample,
    spec: PreprocessSpec,
    *,
    max_frames: int | None = None,
    verify: str = "structure",
    video_backend: str = "auto",
) -> tuple[list[MediaItem], list[list[MediaItem]]]:
    """Every picture of a Sample, and the sampled frames of every video.

    Args:
        sample: whose media to read.
        spec: frames a second and most frames of a video, tile size.
        max_frames: a lower bound on frames for each video, where the sequence holds fewer.
        verify: see `read_image`.
        video_backend: see `open_video`.

    Returns:
        (one item for each of sample.images, one list of frames for each of sample.videos).

    Raises:
        DataError: whose message begins with a reason code.
    """
    images = [read_image(file, verify=verify) for file in sample.images]
    most = min(spec.max_frames, max_frames or spec.max_frames)
    videos = []
    for file in sample.videos:
        with open_video(file, video_backend) as video:
            videos.append(video.frames(spec, most))
    return images, videos
