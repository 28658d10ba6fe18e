"""Clips whose frames show their numbers: a table of containers, codecs and ways of coding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.example import MediaItem
from megatron_vita.data.media.image import decode
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from tests.data.videos import read_number, write_numbered

FRAMES, RATE = 150, 25
ALL = PreprocessSpec(image_size=112, max_frames=4096, max_fps=10_000)

X264 = {"preset": "ultrafast", "bf": "3"}
X265 = "log-level=none:bframes=3:"
GOOD = {"qscale": "2", "flags": "+qscale"}
CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": X264},
    "h264-long-gop.mp4": {"options": X264, "gop": 250},
    "h264-open-gop.mp4": {"options": {**X264, "x264-params": "open-gop=1:keyint=12:scenecut=0"}},
    "h264-refresh.mp4": {"options": {"preset": "ultrafast", "bf": "0", "x264-params": "intra-refresh=1:keyint=20"}},
    "h264-pyramid.mkv": {"options": {"bf": "5", "x264-params": "b-pyramid=normal:ref=5"}, "gop": 30},
    "h264-interlaced.mp4": {"options": {**X264, "flags": "+ildct+ilme"}},
    "h264-fragments.mp4": {"options": X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264-faststart.mp4": {"options": X264, "container_options": {"movflags": "faststart"}},
    "h264-10bit.mp4": {"options": X264, "pix_fmt": "yuv420p10le"},
    "h264-444.mp4": {"options": X264, "pix_fmt": "yuv444p"},
    "h264-odd.mkv": {"options": X264, "pix_fmt": "yuv444p", "side": (97, 65)},
    "h264.mov": {"options": X264},
    "h264.m4v": {"options": X264, "form": "mp4"},
    "h264.3gp": {"options": X264},
    "h264.mkv": {"options": X264},
    "h264.avi": {"options": X264},
    "h264-no-b.avi": {"options": {"preset": "ultrafast", "bf": "0"}},
    "h264.flv": {"options": X264},
    "h264.ts": {"options": X264},
    "h264-open-gop.ts": {"options": {**X264, "x264-params": "open-gop=1:keyint=12:scenecut=0"}},
    "h264.m2ts": {"options": X264, "form": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "h264.wmv": {"options": X264, "form": "asf"},
    "h264.nut": {"options": X264},
    "h264.h264": {"options": X264},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265 + "keyint=24:open-gop=0"}},
    "hevc-open.mp4": {"codec": "libx265", "options": {"preset": "fast", "x265-params": X265 + "keyint=12:open-gop=1"}},
    "hevc-open.mkv": {"codec": "libx265", "options": {"preset": "fast", "x265-params": X265 + "keyint=12:open-gop=1"}},
    "hevc.ts": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265 + "keyint=12"}},
    "hevc.hevc": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265 + "keyint=12"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "tile-columns=0:lp=1"}, "gop": 32},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}, "gop": 32},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}},
    "vp8.ivf": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": {"bf": "2", **GOOD}},
    "mpeg1.avi": {"codec": "mpeg1video", "options": {"bf": "2", **GOOD}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.vob": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.mp4": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.m2v": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.mxf": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg2.wtv": {"codec": "mpeg2video", "options": {"bf": "2", **GOOD}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", **GOOD}},
    "mpeg4-no-b.avi": {"codec": "mpeg4", "options": GOOD},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", **GOOD}},
    "mpeg4.mkv": {"codec": "mpeg4", "options": {"bf": "2", **GOOD}},
    "mpeg4.mov": {"codec": "mpeg4", "options": {"bf": "2", **GOOD}},
    "mpeg4.m4v": {"codec": "mpeg4", "options": {"bf": "2", **GOOD}, "form": "m4v"},
    "mpeg4.3gp": {"codec": "mpeg4", "options": GOOD},
    "h263.3gp": {"codec": "h263", "options": GOOD, "side": (176, 144)},
    "msmpeg4.avi": {"codec": "msmpeg4", "options": GOOD},
    "wmv1.wmv": {"codec": "wmv1", "options": GOOD},
    "wmv2.wmv": {"codec": "wmv2", "options": GOOD},
    "flv1.flv": {"codec": "flv1", "options": GOOD},
    "rv20.rm": {"codec": "rv20", "options": GOOD},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "prores-alpha.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le", "options": {"profile": "4444"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "ffv1.avi": {"codec": "ffv1"},
    "dnxhd.mov": {"codec": "dnxhd", "pix_fmt": "yuv422p", "options": {"profile": "dnxhr_lb"}, "side": (256, 120)},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "utvideo.avi": {"codec": "utvideo"},
    "animation.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "raw.avi": {"codec": "rawvideo"},
    "anim.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "anim.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "anim.webp": {"codec": "libwebp_anim", "pix_fmt": "bgra"},
}
NO_TIMES = ("h264", "hevc", "m2v")
"""Streams without a container: they do not say when a frame is shown; ffmpeg takes 25 a second."""


def clip(folder: Path, name: str, **more: Any) -> MediaFile:
    path = folder / name
    if not path.exists():
        try:
            write_numbered(path, FRAMES, rate=RATE, **{**CLIPS.get(name, {}), **more})
        except Exception as error:
            path.unlink(missing_ok=True)
            pytest.skip(f"this build cannot write {name}: {error}")
    return MediaFile(path=str(path))


def shown(items: list[MediaItem]) -> tuple[list[int], list[float]]:
    """Numbers that the frames show, and the times told of them."""
    return [read_number(decode(item)) for item in items], [float(item.time) for item in items if item.time is not None]


def sample(total: int, count: int) -> list[int]:
    """Frame numbers spread evenly, the first and the last included."""
    return (
        [total // 2] if count == 1 else [(2 * k * (total - 1) + count - 1) // (2 * (count - 1)) for k in range(count)]
    )
