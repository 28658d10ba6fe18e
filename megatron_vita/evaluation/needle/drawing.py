"""Pictures of the generated visual needle: pages with a number, and scenes of coloured shapes without any."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_vita.data.sample import MediaFile
from megatron_vita.files import write_atomic

SIDE = 448
"""Pixels of a picture's side, InternVL's tile."""


def draw_number(number: str) -> bytes:
    """A PNG of a white page with a number in the middle, black, as wide as three quarters of the page."""
    page = Image.new("L", (SIDE, SIDE), 255)
    font = ImageFont.load_default(size=round(SIDE * 1.2 / len(number)))
    ImageDraw.Draw(page).text((SIDE / 2, SIDE / 2), number, fill=0, font=font, anchor="mm")
    return _png(page)


def draw_scene(seed: int, number: int) -> bytes:
    """A PNG of coloured ellipses and boxes on a coloured ground: scene `number` of a seed."""
    draw = np.random.default_rng((seed, number))
    scene = Image.new("P", (SIDE, SIDE), 0)
    scene.putpalette(draw.integers(30, 226, size=7 * 3).tolist())
    pen = ImageDraw.Draw(scene)
    for colour in range(1, 7):
        left, top = draw.integers(-SIDE // 8, SIDE, size=2).tolist()
        wide, tall = draw.integers(SIDE // 10, SIDE // 2, size=2).tolist()
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((left, top, left + wide, top + tall), fill=colour)
    return _png(scene)


def drawn(path: Path, draw: Callable[[], bytes]) -> MediaFile:
    """A picture's file, which is drawn if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, draw())
    return MediaFile(path=str(path))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
