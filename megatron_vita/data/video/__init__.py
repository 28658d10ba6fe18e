"""The import path of scripts outside this repository; the code is in data/media/video/."""

from megatron_vita.data.media.video.open import open_video

__all__ = ["open_video"]
