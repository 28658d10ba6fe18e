"""All media of a Sample at once."""

from __future__ import annotations

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import read_image
from megatron_vita.data.media.video.open import open_video
from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec


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
        DataError: whose message begins with an error code.
    """
    images = [read_image(file, verify=verify) for file in sample.images]
    most = min(spec.max_frames, max_frames or spec.max_frames)
    videos = []
    for file in sample.videos:
        with open_video(file, video_backend) as video:
            videos.append(video.frames(spec, most))
    return images, videos
