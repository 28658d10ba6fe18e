"""Map the settings of transformers' InternVLProcessor in a folder to the equivalent preprocessing.

Read in transformers 5.24 (with its PIL image processor, GotOcr2ImageProcessorPil):

* `image_processor` inside processor_config.json is believed, and nothing of preprocessor_config.json beside it. For
  videos it is `video_processor` there, then video_preprocessor_config.json, then preprocessor_config.json.
* What is absent is the class's default: 384 pixels, CLIP's mean and deviation. Null is not: a flag is then off.
* InternVLProcessor always asks for tiles, whatever `crop_to_patches` says: `max_patches` alone decides. Tiles are
  resized whatever `do_resize` says, never cropped at the centre, never padded.
* Keys of tokenizer_config.json that name an image processor's setting override that setting.

Settings that stock code obeys and megatron_vita does not support are rejected by name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vita.config import IMAGE_NORMS, VisionConfig
from megatron_vita.convert.hf_config import integer, mistyped, read_json, require, unsupported
from megatron_vita.convert.processor_files import (
    BICUBIC,
    PIXEL_SETTINGS,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    VIDEO_FILE,
    check_side,
    image_settings,
    nested_settings,
    norm_name,
    read_side_file,
    side_of,
    switch,
)
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_CLASS = "InternVLProcessor"
_IMAGE_CLASSES = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil")
_VIDEO_CLASS = "InternVLVideoProcessor"
_DEFAULTS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "resample": BICUBIC,
    "image_mean": list(IMAGE_NORMS["clip"][0]),
    "image_std": list(IMAGE_NORMS["clip"][1]),
    "min_patches": 1,
    "max_patches": 12,
    "do_resize": True,
    "default_to_square": True,
    "do_center_crop": False,
    "do_pad": False,
    "do_sample_frames": False,
}
"""Of stock's classes, where a folder says nothing."""
_MOST_TILES = 1 << 10
_OVERRIDDEN = {*PIXEL_SETTINGS, "crop_to_patches", "do_sample_frames", "num_frames", "fps", "initial_shift"}
"""Settings of image and video processors that tokenizer_config.json would override."""


def read_spec(folder: Path, vision: VisionConfig) -> PreprocessSpec:
    """How stock code prepares pictures for a native InternVL. What it cannot say (layout, most frames) comes from the
    side file of an export, else it is the default; a folder without any settings is what its tower asks for. Raises
    CheckpointError: settings that stock code obeys and we cannot, or that it cannot load either; named."""
    try:
        spec = read_side_file(folder, vision) or PreprocessSpec.for_tower(vision)
        given, where = image_settings(folder)
        if not Path(where).is_file():
            return spec
        kind = given.get("image_processor_type") or given.get("feature_extractor_type")
        if kind is not None and str(kind).replace("FeatureExtractor", "ImageProcessor") not in _IMAGE_CLASSES:
            raise unsupported(where, "image_processor_type", kind, _IMAGE_CLASSES[0])
        values = {**_DEFAULTS, **given}
        check_side(_side(values, "size", where), vision, where)
        least, most = _tiles(values, where)
        spec = dataclasses.replace(spec, image_norm=_pixels(values, where), min_tiles=least, max_tiles=most)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: the settings of pictures are not usable: {error}") from None
    _check_joint(folder, vision)
    video = _video_settings(folder)
    if video is not None:
        _check_video(*video, spec)
    return spec


def _video_settings(folder: Path) -> tuple[dict[str, Any], str] | None:
    path = folder / PROCESSOR_FILE
    nested = nested_settings(path, "video_processor")
    if nested is None:
        places = [one for one in (folder / VIDEO_FILE, folder / PREPROCESSOR_FILE) if one.is_file()]
        if not places:
            return None
        path, nested = places[0], read_json(places[0])
    kind = nested.get("video_processor_type")
    if kind not in (None, _VIDEO_CLASS):
        raise unsupported(str(path), "video_processor_type", kind, _VIDEO_CLASS)
    return {**_DEFAULTS, **nested}, str(path)


def _side(values: Mapping[str, Any], key: str, where: str) -> int:
    """Side of the square that `size` or `crop_size` names as stock code reads it."""
    size = values.get(key)
    if type(size) is int and key == "size" and not switch(values, "default_to_square", where):
        raise unsupported(where, "default_to_square", False, "a size that is one number is then the shortest edge")
    if isinstance(size, dict) and size.keys() != {"height", "width"}:
        raise unsupported(where, key, size, "height and width")
    return side_of(size, key, where)


def _tiles(values: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(fewest, most) tiles."""
    numbers = []
    for key in ("min_patches", "max_patches"):
        value = values[key]
        if type(value) is not int or value > _MOST_TILES:
            raise mistyped(where, key, f"a whole number up to {_MOST_TILES}", value)
        numbers.append(value)
    least, most = numbers
    if most < 2 and not switch(values, "do_resize", where):
        raise unsupported(
            where, "do_resize", False, "with max_patches 1, pictures would enter the tower in their own size"
        )
    if most < 2 or least > most:  # no grid is allowed, and stock code falls back to one tile
        return 1, 1
    return max(1, least), most


def _pixels(values: Mapping[str, Any], where: str) -> str:
    """Name of the mean and deviation that pixels get; reject other arithmetic."""
    require(values, "resample", BICUBIC, BICUBIC, where)
    for key, needed in (("do_center_crop", "crop_size"), ("do_pad", "pad_size")):
        if switch(values, key, where) and values.get(needed) is None:
            raise unsupported(where, key, True, f"stock code wants {needed} beside it")
    return norm_name(values, where)


def _check_joint(folder: Path, vision: VisionConfig) -> None:
    """Settings of InternVLProcessor itself, and of the tokenizer where they reach the image processor."""
    path = folder / PROCESSOR_FILE
    if path.is_file():
        values, where = read_json(path), str(path)
        if values.get("processor_class") is not None:
            require(values, "processor_class", _CLASS, _CLASS, where)
        if "image_seq_length" in values:
            wanted = integer(values, "image_seq_length", where)
            if wanted != vision.tokens_per_tile:
                raise CheckpointError(
                    f"{where}: image_seq_length={wanted}, the tower gives {vision.tokens_per_tile} a tile."
                )
    path = folder / "tokenizer_config.json"
    overridden = sorted(_OVERRIDDEN & read_json(path).keys()) if path.is_file() else []
    if overridden:
        raise CheckpointError(
            f"{path}: {overridden[0]} is a setting of pictures, and stock code obeys it over {PREPROCESSOR_FILE}. "
            "Remove it there, and say it here if it is meant."
        )


def _check_video(values: Mapping[str, Any], where: str, spec: PreprocessSpec) -> None:
    """Reject frames that stock code prepares otherwise than pictures; where its own tower cannot take them, warn."""
    if switch(values, "do_sample_frames", where):
        raise unsupported(
            where,
            "do_sample_frames",
            True,
            "frames are chosen by time, at most max_fps a second and max_frames; set it to false",
        )
    resized = _side(values, "size", where) if switch(values, "do_resize", where) else None
    cropped = _side(values, "crop_size", where) if switch(values, "do_center_crop", where) else None
    final = resized if cropped is None else cropped
    if final not in (None, spec.image_size):
        log.warning(
            "%s: makes frames of %s pixels a side, which the tower does not take; videos are prepared as pictures are, "
            "with %d",
            where,
            final,
            spec.image_size,
        )
        return
    if cropped is not None and resized != cropped:
        raise unsupported(where, "do_center_crop", True, f"frames are resized to {cropped} pixels, not cropped")
    norm = _pixels(values, where)
    if norm != spec.image_norm:
        raise CheckpointError(
            f"{where}: normalises frames of videos as {norm}, pictures are normalised as {spec.image_norm} "
            "(image_mean, image_std). A tower has one normalisation here: correct the one that is wrong."
        )
