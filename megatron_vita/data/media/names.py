"""Names of media files: kind, order, and whether they stay inside their folder. No file is opened."""

from __future__ import annotations

import os
import re

from megatron_vita.data.rejects import reject

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts")
FRAME_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")
"""Suffixes of pictures in a folder of frames."""
NO_FRAMES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".exr", ".hdr")
"""Of pictures that are no frames of such a folder: several in one file, or in a format that is not read."""


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which `frame2` comes before `frame10`; no two names have the same."""
    pieces = re.split(r"([0-9]+)", name)
    digits = (piece.lstrip("0") for piece in pieces)  # compared by their count: a number may have thousands
    return [
        (0, len(digit), digit) if number % 2 else (1, 0, piece)
        for number, (piece, digit) in enumerate(zip(pieces, digits, strict=True))
    ], name


def locate(root: str, path: str) -> str | None:
    """A path of a dataset inside its media root, links resolved; None where nothing is there.

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
            "path_escape",
            f"{path} leaves the media root. Set it (`media_root`, --media-root) to the folder that holds the file.",
        )
    return real if os.path.exists(real) else None
