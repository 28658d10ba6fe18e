"""How a Hugging Face folder wants its pictures, read and written: processor settings, and what these cannot say.

transformers 4 keeps the image processor's settings in preprocessor_config.json. transformers 5 saves them inside
processor_config.json, and reads them there or, if there are none, in the old place; so that is where ours are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vita.config import IMAGE_NORMS, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.convert.hf_config import flag, optional_integer, read_json, section
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError

PREPROCESSOR_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
_NESTED = "image_processor"
"""Key of PROCESSOR_FILE."""
SIDECAR = "megatron_vita.json"
"""What an exported folder remembers beyond what stock files can say."""
_BICUBIC = 3
"""PIL's number."""
_READ = ("image_mean", "image_std", "min_patches", "max_patches", "crop_to_patches")


def read_spec(folder: Path, vision: VisionConfig, *, layout: str) -> PreprocessSpec:
    """How a model wants its pictures: from our own side file where we wrote the folder, else from the stock settings.

    Args:
        folder: the model's.
        vision: its tower.
        layout: token layout, which no stock file says.

    Raises:
        CheckpointError: settings that say two things, or nothing that we can do.
    """
    where: Path = folder / SIDECAR
    try:
        if where.is_file():
            spec = PreprocessSpec.from_dict(read_json(where)["preprocess"])
            _check_side(spec.image_size, vision, where)
            return spec
        values, where = _settings(folder)
        default = dataclasses.replace(PreprocessSpec.for_tower(vision), layout=layout)
        _check_size(values, vision, where)
        tiles = values.get("crop_to_patches", True)
        return dataclasses.replace(
            default,
            image_norm=_norm_name(values, where, default.image_norm),
            min_tiles=int(values.get("min_patches", default.min_tiles)) if tiles else 1,
            max_tiles=int(values.get("max_patches", default.max_tiles)) if tiles else 1,
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: has no {error}. Download it again.") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: these settings of pictures are not usable: {error}") from None


def with_norm(folder: Path, vision: VisionConfig) -> VisionConfig:
    """A tower with the mean and deviation of pixels that its folder's settings say, if it has any.

    Raises:
        CheckpointError: settings that say two things, or nothing that we can do.
    """
    values, where = _settings(folder)
    _check_size(values, vision, where)
    return dataclasses.replace(vision, image_norm=_norm_name(values, where, vision.image_norm))


def with_own_projector(folder: Path, model: ModelConfig) -> ModelConfig:
    """A model with the projector that SIDECAR says it had before it was padded with zeros to be a stock one.

    Raises:
        CheckpointError: the file is damaged, or no stock projector can hold such a one.
    """
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
    """Settings of the image, video and joint processors by file name; all written out, because no default fits.

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
        "resample": _BICUBIC,
    }
    tiles = {"crop_to_patches": spec.max_tiles > 1, "min_patches": spec.min_tiles, "max_patches": spec.max_tiles}
    processor = {"processor_class": "InternVLProcessor"}
    return {
        PREPROCESSOR_FILE: {
            **processor,
            "image_processor_type": "GotOcr2ImageProcessor",
            **pixels,
            **tiles,
        },
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


def _settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and the file that holds them, the new place before the old one; empty if none."""
    old, new = folder / PREPROCESSOR_FILE, folder / PROCESSOR_FILE
    values = read_json(old) if old.is_file() else {}
    nested = read_json(new).get(_NESTED) if new.is_file() else None
    if nested is None:
        return values, old
    if not isinstance(nested, dict):
        raise CheckpointError(f"{new}: {_NESTED} must be an object, got {nested!r}. Download it again.")
    for key in _READ if values else ():
        if key in values and key in nested and values[key] != nested[key]:
            raise CheckpointError(
                f"{new}: says {_NESTED}.{key}={nested[key]!r}, {old.name} beside it {values[key]!r}, and releases of "
                "transformers differ in which they believe. Remove the one that is wrong."
            )
    return {**values, **nested}, new


def _norm_name(values: Mapping[str, Any], where: Path, default: str) -> str:
    pair = (values.get("image_mean"), values.get("image_std"))
    if pair == (None, None):
        return default
    for name, (mean, std) in IMAGE_NORMS.items():
        if list(mean) == pair[0] and list(std) == pair[1]:
            return name
    raise CheckpointError(f"{where}: unknown image_mean and image_std {pair}.")


def _check_size(values: Mapping[str, Any], vision: VisionConfig, where: Path) -> None:
    """What enters the tower is as large as the tower asks: the crop if there is one, else what is resized to."""
    cropped = values.get("do_center_crop") and values.get("crop_size") is not None
    key = "crop_size" if cropped else "size"
    size = values.get(key)
    if size is None:
        return
    sides = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list) else [size]
    if not sides or any(type(one) is not int or one != sides[0] for one in sides):
        raise CheckpointError(f"{where}: {key}={size!r} is no side of a square.")
    _check_side(sides[0], vision, where)


def _check_side(side: int, vision: VisionConfig, where: Path) -> None:
    if side != vision.image_size:
        raise CheckpointError(
            f"{where}: makes pictures of {side} pixels a side, but the tower in config.json has "
            f"image_size={vision.image_size}. Correct the one that is wrong."
        )
