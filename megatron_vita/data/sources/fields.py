"""Names of fields: of media, of loss marks, of tools, reasoning and metadata; and which values are media.

Every name is compared as `plain` writes it: `imagePath`, `Image-Path` and `IMAGE_PATH` are `image_path`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.data.media.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megatron_vita.data.sample import MediaFile


def load_own(name: str) -> dict[str, Any]:
    """A YAML file of this package."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml reads ten times as fast


_NAMES = load_own("names.yaml")


def _spelt(group: str) -> tuple[str, ...]:
    one = _NAMES[group]
    return (*(word + ending for ending in _NAMES["endings"] for word in one["words"]), *one["others"])


IMAGE_NAMES, VIDEO_NAMES = _spelt("image"), _spelt("video")
_SURE = frozenset(_NAMES["sure"])
UNREAD_MEDIA = frozenset(_spelt("unread_media"))
FRAMES_NAMES, FILE_NAMES = tuple(_NAMES["frames"]), tuple(_NAMES["file"])
_MEDIA = frozenset((*IMAGE_NAMES, *VIDEO_NAMES, *FRAMES_NAMES))
TOOLS, REASONING, CONTEXT, SPANS, TRAIN_ON_INPUT, METADATA = (
    frozenset(_NAMES[group]) for group in ("tools", "reasoning", "context", "span", "train_on_input", "metadata")
)
WEIGHTS, LEARNT, MASKED, LAST_ONLY, LEARNT_SPANS = (
    frozenset(_NAMES[group]) for group in ("weight", "learnt", "masked", "last_only", "learnt_spans")
)
STRUCT = tuple(_NAMES["struct"])
NUMBERED = re.compile(r"^(image|img|picture|pic|photo|video|clip)_?(\d+)$")
"""`image_1`, `image_2`: one medium each, in the order of their numbers."""
_METADATA_SHAPE = re.compile(
    r"^(?:__.*|num_.*|n_.*|.*_(?:ids?|length|count|score|size|width|height|at|hash|type|date))$"
)

_OTHER_SUFFIXES = (
    ".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".pdf", ".djvu", ".ply", ".pcd", ".las", ".laz", ".obj",
    ".glb", ".gltf", ".stl", ".npy", ".npz", ".svg", ".heic", ".heif", ".avif", ".jxl", ".exr", ".hdr", ".dcm", ".nii",
    ".nii.gz", ".ogv", ".vob", ".mts", ".pfm",
)  # fmt: skip
_MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *_OTHER_SUFFIXES)
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0AKg", "AAAA")
"""How the base64 of JPEG, PNG, GIF, WebP, BMP, TIFF and MP4 begins."""
_LONGEST_PATH = 1024
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A field's name in lower case and underscores."""
    return _CAMEL.sub("_", name).lower().replace("-", "_").replace(" ", "_")


@lru_cache(maxsize=4096)
def is_metadata(name: str) -> bool:
    """Is nothing under such a name taught? `name` as `plain` gives it."""
    return name in METADATA or _METADATA_SHAPE.match(name) is not None


def is_empty(value: Any) -> bool:
    """Nothing: null, an empty text or list, a table's NaN, a struct of nothing, false."""
    if value is None or value is False or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return isinstance(value, str | bytes | list | tuple) and not value


def is_nothing(value: Any) -> bool:
    """`is_empty`, or a text that says so."""
    return is_empty(value) or (isinstance(value, str) and value.strip().lower() in ("", "[]", "{}", "null", "none"))


def listed(value: Any) -> list[Any]:
    """The media of a field: none, one, or those of a list."""
    if is_empty(value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def is_address(value: Any) -> bool:
    """Is it a web address?"""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("url") or value.get("path")
    return isinstance(value, str) and value.lower().startswith(("http://", "https://", "ftp://", "s3://", "gs://"))


def is_base64(value: str) -> bool:
    """Does a text begin as the base64 of a picture or video does, and is it too long for a path?"""
    return len(value) > 64 and value.startswith(_BASE64) and " " not in value[:64] and "." not in value[-8:]


def is_embedded(value: Any) -> bool:
    """Is it the medium itself: bytes, base64, a data: address, a member of an archive?"""
    if isinstance(value, dict):
        return any(is_embedded(value.get(key)) for key in STRUCT)
    if isinstance(value, str):
        return value.startswith("data:") or is_base64(value)
    return isinstance(value, bytes | bytearray | MediaFile) and value != b""


def is_medium(value: Any) -> bool:
    """Does a value look like a medium: bytes, or the path or address of a file whose suffix says so?"""
    if isinstance(value, str):
        if is_embedded(value):
            return True
        if len(value) > _LONGEST_PATH or "\n" in value:
            return False
        return value.split("?")[0].split("#")[0].strip().lower().endswith(_MEDIA_SUFFIXES)
    return is_embedded(value)


def find_medium(value: Any, path: str = "", depth: int = 6) -> str | None:
    """Where in a value something looks like a medium: `.a[0].b`; None: nowhere."""
    if is_medium(value):
        return path
    inner: Iterable[tuple[str, Any]] = ()
    if depth and isinstance(value, dict):
        inner = ((f"{path}.{key}", one) for key, one in value.items())
    elif depth and isinstance(value, list | tuple):
        inner = ((f"{path}[{number}]", one) for number, one in enumerate(value[:64]))
    return next((found for where, one in inner if (found := find_medium(one, where, depth - 1)) is not None), None)


def holds_media(name: str, value: Any) -> bool:
    """Are the media of a record or turn in a field? `name` as `plain` gives it.

    `image` and its like hold a medium whatever stands there; others (`clip`, `image_name`) if it looks like one.
    """
    if name not in _MEDIA or is_empty(value) or isinstance(value, bool | int | float):
        return False
    return name in _SURE or find_medium(value) is not None


def has_text(value: Any) -> bool:
    """Does a value hold words?"""
    if isinstance(value, dict):
        return any(map(has_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_text, value))
    return isinstance(value, str) and any(map(str.isalpha, value))
