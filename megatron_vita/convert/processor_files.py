"""Read and write processor settings of a Hugging Face folder; settings that they cannot hold have a file of their own.

transformers 4 keeps the image processor's settings in preprocessor_config.json. transformers 5 saves them inside
processor_config.json, and reads them there or, if there are none, in the old place; an export writes them there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vita.config import IMAGE_NORMS, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert.hf_config import flag, mistyped, number, optional_integer, read_json, section, unsupported
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

PREPROCESSOR_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
SIDECAR = "megatron_vita.json"
"""Settings of an exported folder that stock files cannot hold."""
BICUBIC = 3
"""PIL's number of the filter."""
PIXEL_SETTINGS = {
    *("size", "default_to_square", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "min_patches", "max_patches", "do_convert_rgb", "do_center_crop", "crop_size"),
    *("do_pad", "pad_size"),
}
"""Keys of an image processor that stock code obeys."""
_RELATIVE = 1e-6
"""Tolerance of means and deviations, below the resolution of float32 pixels."""


def read_side_file(folder: Path, vision: VisionConfig) -> PreprocessSpec | None:
    """Preprocessing in the side file of an export; none in a folder of another publisher. Raises CheckpointError: it is
    damaged, or does not fit the tower."""
    where = folder / SIDECAR
    if not where.is_file():
        return None
    try:
        spec = PreprocessSpec.from_dict(read_json(where)["preprocess"])
    except KeyError as error:
        raise CheckpointError(f"{where}: has no {error}. Download it again.") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: these settings of pictures are not usable: {error}") from None
    check_side(spec.image_size, vision, str(where))
    return spec


def with_norm(folder: Path, vision: VisionConfig) -> VisionConfig:
    """A tower with the mean and deviation of pixels in its folder's settings, if any. Raises CheckpointError: settings
    that say two things, or nothing that we can do."""
    values, where = image_settings(folder)
    # What enters the tower is the crop if there is one, else what is resized to.
    key = "crop_size" if values.get("do_center_crop") and values.get("crop_size") is not None else "size"
    if values.get(key) is not None:
        check_side(side_of(values[key], key, where), vision, where)
    mean, std = IMAGE_NORMS[vision.image_norm]
    said = {key: values[key] for key in values if key not in ("image_mean", "image_std") or values[key] is not None}
    name = norm_name({"image_mean": list(mean), "image_std": list(std), **said}, where)
    return dataclasses.replace(vision, image_norm=name)


def with_own_projector(folder: Path, model: ModelConfig) -> ModelConfig:
    """A model with the projector width that SIDECAR records from before it was padded with zeros. Raises
    CheckpointError: the file is damaged, or no stock projector can hold such a one."""
    path = folder / SIDECAR
    values = section(read_json(path), "projector", str(path)) if path.is_file() else None
    if values is None:
        return model
    where = f"{path}: projector"
    projector = ProjectorConfig(
        ffn_hidden_size=optional_integer(values, "ffn_hidden_size", where, most=model.hidden_size),
        bias=flag(values, "bias", True, where),
    )
    return dataclasses.replace(model, projector=projector)


def processor_files(model: ModelConfig, spec: PreprocessSpec) -> dict[str, dict[str, Any]]:
    """Settings of the image, video and joint processors by file name, all explicit, because no default fits.

    Args:
        model: with a tower.
        spec: how it wants its pictures.
    """
    assert model.vision is not None
    mean, std = IMAGE_NORMS[spec.image_norm]
    size = {"height": spec.image_size, "width": spec.image_size}
    pixels = {
        "size": size,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": BICUBIC,
    }
    tiles = {"crop_to_patches": spec.max_tiles > 1, "min_patches": spec.min_tiles, "max_patches": spec.max_tiles}
    processor = {"processor_class": "InternVLProcessor"}
    return {
        PREPROCESSOR_FILE: {**processor, "image_processor_type": "GotOcr2ImageProcessor", **pixels, **tiles},
        VIDEO_FILE: {
            **processor,
            "video_processor_type": "InternVLVideoProcessor",
            **pixels,
            "do_sample_frames": False,
            "num_frames": spec.max_frames,
        },
        PROCESSOR_FILE: {**processor, "image_seq_length": model.vision.tokens_per_tile},
        SIDECAR: {
            "format_version": 1,
            "preprocess": spec.to_dict(),
            "projector": {"ffn_hidden_size": model.projector.ffn_hidden_size, "bias": model.projector.bias},
        },
    }


def side_of(size: Any, key: str, where: str) -> int:
    """Side of a square size: one number, two equal ones, or an object of equal ones. Raises CheckpointError: it is
    none."""
    sides = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list) else [size]
    if not sides or any(type(one) is not int or one != sides[0] for one in sides):
        raise CheckpointError(f"{where}: {key}={size!r} is no side of a square.")
    return int(sides[0])


def check_side(side: int, vision: VisionConfig, where: str) -> None:
    """Reject a picture size other than the tower's. Raises CheckpointError: saying both sizes."""
    if side != vision.image_size:
        raise CheckpointError(
            f"{where}: makes pictures of {side} pixels a side, but the tower in config.json has "
            f"image_size={vision.image_size}. Correct the one that is wrong."
        )


def norm_name(values: Mapping[str, Any], where: str) -> str:
    """Name of the mean and deviation by which an image processor normalises pixels. Raises CheckpointError: the pixel
    values are not those of a supported normalisation.

    Args:
        values: its settings; image_mean and image_std must be there.
    """
    scale = 255.0  # of the largest pixel; mean and deviation are known for pixels of 0..1
    if switch(values, "do_rescale", where, default=True):
        scale *= number({"rescale_factor": 1 / 255, **values}, "rescale_factor", where)
    if not switch(values, "do_normalize", where, default=True):
        raise unsupported(where, "do_normalize", False, "pixels are always normalised")
    pair = tuple(_channels(values, key, where) for key in ("image_mean", "image_std"))
    for name, norms in IMAGE_NORMS.items():
        if all(
            math.isclose(one / scale, wanted, rel_tol=_RELATIVE)
            for given, known in zip(pair, norms, strict=True)
            for one, wanted in zip(given, known, strict=True)
        ):
            return name
    rescaled = "" if math.isclose(scale, 1) else f" of pixels of 0..{scale:g} (do_rescale, rescale_factor)"
    raise CheckpointError(
        f"{where}: unknown image_mean and image_std {(values['image_mean'], values['image_std'])}{rescaled}."
    )


def switch(values: Mapping[str, Any], key: str, where: str, *, default: bool = False) -> bool:
    """A flag of an image processor: stock code takes null for false, also where its default is true."""
    return values.get(key, default) is not None and flag(values, key, default, where)


def _channels(values: Mapping[str, Any], key: str, where: str) -> list[float]:
    """A number for each of three channels, given once or three times."""
    value = values[key]
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or any(not isinstance(one, int | float) or isinstance(one, bool) for one in numbers):
        raise mistyped(where, key, "a number, or one for each of three channels", value)
    return [float(one) for one in numbers]


def image_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Settings of a folder's image processor and the file that holds them, as transformers 5 reads them: what
    processor_config.json has inside, else preprocessor_config.json. Empty where there are none. Raises CheckpointError:
    a file is damaged."""
    old, new = folder / PREPROCESSOR_FILE, folder / PROCESSOR_FILE
    values = read_json(old) if old.is_file() else {}
    nested = nested_settings(new, "image_processor")
    if nested is None:
        return values, str(old)
    differing = sorted(key for key in values.keys() & nested.keys() & PIXEL_SETTINGS if values[key] != nested[key])
    if differing:
        log.warning(
            "%s: is believed, as transformers 5 does; %s beside it, which transformers 4 reads, says otherwise of %s",
            new,
            old.name,
            ", ".join(differing),
        )
    return nested, str(new)


def nested_settings(path: Path, key: str) -> dict[str, Any] | None:
    """Settings of one processor inside processor_config.json, or none."""
    value = read_json(path).get(key) if path.is_file() else None
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} must be an object, got {value!r}. Download it again.")
    return value
