"""Small videos of grey frames for the tests: number k of n has the grey 20 + 200 k / n."""

from __future__ import annotations

import fractions
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest


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
