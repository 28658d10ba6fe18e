"""Pictures of the generated visual needle: pages with a number, and scenes of coloured shapes without any."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    ground, *colours = ((int(r), int(g), int(b)) for r, g, b in draw.integers(30, 226, size=(7, 3)))
    scene = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(scene)
    for colour in colours:
        left, top = draw.integers(-SIDE // 8, SIDE, size=2).tolist()
        wide, tall = draw.integers(SIDE // 10, SIDE // 2, size=2).tolist()
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((left, top, left + wide, top + tall), fill=colour)
    return _png(scene.quantize(16))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
