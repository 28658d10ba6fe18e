"""What the names of media files tell: kind, order."""

from __future__ import annotations

import re

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
"""Of the pictures in a folder that stands for a video."""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `frame2` comes before `frame10`."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"([0-9]+)", name)]
