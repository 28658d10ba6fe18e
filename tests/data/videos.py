"""Small videos for the tests: of grey frames, and of frames that show their own number."""

from __future__ import annotations

import fractions
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image


def write_video(
    path: Path,
    greys: Sequence[int],
    *,
    codec: str = "libx264",
    side: tuple[int, int] = (64, 48),
    rate: int = 1,
    milliseconds: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    left: int | None = None,
) -> Path:
    """A clip with one frame a grey, shown at `rate` a second or at the given times; maybe another grey on the left."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height = side
        stream.pix_fmt = "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for number, grey in enumerate(greys):
            pixels = np.full((side[1], side[0]), grey, np.uint8)
            if left is not None:
                pixels[:, : side[0] // 2] = left
            frame = av.VideoFrame.from_ndarray(pixels, format="gray")
            frame = frame.reformat(format="yuv420p")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


BITS, SIDE = 12, (96, 64)
"""A numbered frame: 4 by 3 blocks of 24 by 21 pixels, light where the bit of the frame's number is set."""


def numbered(number: int, side: tuple[int, int] = SIDE) -> npt.NDArray[np.uint8]:
    """A frame that shows its number, uint8 `[height, width, 3]`."""
    grid = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(3, 4) * 170 + 40
    rows, cols = (np.arange(size) * parts // size for size, parts in ((side[1], 3), (side[0], 4)))
    return np.repeat(grid[rows][:, cols, None], 3, axis=2)


def read_number(picture: Image.Image) -> int:
    """The number that a frame shows."""
    pixels = np.asarray(picture.convert("L"), dtype=np.float64)
    height, width = pixels.shape[0] // 3, pixels.shape[1] // 4
    means = [
        pixels[
            row * height + height // 4 : (row + 1) * height - height // 4,
            col * width + width // 4 : (col + 1) * width - width // 4,
        ].mean()
        for row in range(3)
        for col in range(4)
    ]
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 125)


def write_numbered(
    path: Path,
    count: int,
    *,
    codec: str = "libx264",
    rate: int = 25,
    gop: int = 12,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    side: tuple[int, int] = SIDE,
    milliseconds: Sequence[int] | None = None,
    form: str | None = None,
    container_options: Mapping[str, str] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    aspect: fractions.Fraction | None = None,
    start: int = 0,
) -> Path:
    """A clip whose frames show their numbers 0..count-1, at `rate` a second or at the given times.

    Args:
        path: the file; its suffix names the container, unless `form` does.
        count: frames.
        codec: of the encoder.
        rate: frames a second.
        gop: frames from one key frame to the next.
        options: of the encoder.
        pix_fmt: pixel format.
        side: width, height.
        milliseconds: when each frame is shown.
        form: ffmpeg's name of the container.
        container_options: of the muxer.
        rotation: degrees counter-clockwise, flipped horizontally, flipped vertically.
        aspect: width of a pixel over its height.
        start: of the first frame, in frames.
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=form, options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height = side
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        if milliseconds is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number, side), format="rgb24").reformat(format=pix_fmt)
            frame.pts = start + number if milliseconds is None else milliseconds[number]
            frame.time_base = fractions.Fraction(1, rate if milliseconds is None else 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
