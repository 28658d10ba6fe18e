"""A checkpoint -> a complete Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_vita.checkpoint.lazy import LazyTensors
from megatron_vita.config import IMAGE_NORMS, ModelConfig, to_dict
from megatron_vita.convert import internvl, long_vita, qwen2
from megatron_vita.convert.opening import SIDECAR, OpenModel, open_model
from megatron_vita.convert.publish import new_folder
from megatron_vita.convert.safetensors_folder import MAX_SHARD_BYTES, write_safetensors
from megatron_vita.convert.tokenizer_files import copy_for_export
from megatron_vita.convert.views import Subset, TheirView
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.tokenizer import END_OF_TEXT, IM_END
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

FORMATS = ("internvl", "long_vita", "llm")
_FAMILIES: dict[str, Any] = {"internvl": internvl, "long_vita": long_vita, "llm": qwen2}
_BICUBIC = 3
"""PIL's number."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    format_name: str,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a checkpoint (or of any model that open_model opens) as a Hugging Face folder.

    Args:
        format_name: `internvl` (stock transformers loads it), `long_vita` (the published names) or `llm` (the decoder).
        tokenizer: tokenizer folder, by default the one inside the checkpoint.
        dtype: convert the weights; by default they keep their type.

    Returns:
        `output`.

    Raises:
        CheckpointError, ConfigError: the model does not fit the format, or the checkpoint is damaged. Nothing is
            published then.
    """
    output = Path(output)
    opened = open_model(checkpoint)
    model, family = opened.model, _FAMILIES[format_name]
    vision = format_name != "llm"
    if vision:
        family.check_exportable(model)
    else:
        _check_decoder(model)
    source: LazyTensors = opened.tensors
    if not vision:
        source = Subset(source, [name for name in source if name.startswith("language_model.")])
    tensors = TheirView(family.rules(model), source, str(opened.path), dtype)
    with new_folder(output, overwrite=overwrite) as folder:
        ids = copy_for_export(Path(tokenizer) if tokenizer else opened.tokenizer_dir, folder, vision=vision)
        stored = str(tensors.dtype(next(iter(tensors)))).removeprefix("torch.")
        _write_json(folder / "config.json", family.write_config(model, stored, ids))
        _write_json(folder / "generation_config.json", _generation(ids))
        if vision:
            spec = opened.preprocess or _default_spec(model)
            for name, values in processor_files(model, spec).items():
                _write_json(folder / name, values)
        written = write_safetensors(folder, tensors, max_shard_bytes)
        _write_card(folder / "README.md", opened, format_name, written)
    log.info("exported %d tensors, %.2f GB", len(tensors), written / 1e9)
    return output


def processor_files(model: ModelConfig, spec: PreprocessSpec) -> dict[str, dict[str, Any]]:
    """Settings of the image, video and joint processors by file name; all written out, because no default fits."""
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
        "preprocessor_config.json": {
            **processor,
            "image_processor_type": "GotOcr2ImageProcessor",
            **pixels,
            **tiles,
        },
        "video_preprocessor_config.json": {
            **processor,
            "video_processor_type": "InternVLVideoProcessor",
            **pixels,
            "do_sample_frames": False,
            "num_frames": spec.max_frames,
        },
        "processor_config.json": {**processor, "image_seq_length": model.vision.tokens_per_tile},
        SIDECAR: {"format_version": 1, "preprocess": spec.to_dict()},
    }


def _check_decoder(model: ModelConfig) -> None:
    if not model.add_qkv_bias:
        raise CheckpointError(
            "the decoder has no query, key and value biases; Qwen2 has. It cannot be exported as llm."
        )


def _default_spec(model: ModelConfig) -> PreprocessSpec:
    assert model.vision is not None
    return PreprocessSpec(image_size=model.vision.image_size, patch_size=model.vision.patch_size)


def _generation(ids: Mapping[str, int]) -> dict[str, Any]:
    """Greedy by default: answers end at the end of a turn or of a text."""
    ends = [ids[name] for name in (IM_END, END_OF_TEXT) if name in ids]
    return {"eos_token_id": ends, "pad_token_id": ids.get(END_OF_TEXT), "bos_token_id": ids.get(END_OF_TEXT)}


def _write_card(path: Path, opened: OpenModel, format_name: str, size: int) -> None:
    model = opened.model
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if format_name == 'llm' else 'image-text-to-text'}",
        "---",
        "",
        f"# {path.parent.name.removeprefix('.writing-')}",
        "",
        f"Written by megatron_vita, format `{format_name}`, {size / 1e9:.3f} GB of weights:",
        f"{model.num_layers} decoder layers of width {model.hidden_size}{_tower_phrase(model, format_name)}.",
        "",
    ]
    if format_name == "internvl":
        lines += [
            "```python",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            "model = AutoModelForImageTextToText.from_pretrained(folder)",
            "processor = AutoProcessor.from_pretrained(folder)",
            "```",
            "",
        ]
        if opened.preprocess is not None and opened.preprocess.layout != "internvl":
            lines += [
                f"**Token layout**: trained in the `{opened.preprocess.layout}` layout, which the stock processor",
                "cannot write. Prepare its input with megatron_vita.",
                "",
            ]
    if opened.state is not None:
        state = opened.state
        recipe = to_dict(state.stage)
        for name in ("data_path", "valid_data_path", "tokenizer_model"):
            recipe["data"][name] = _last_part(recipe["data"][name])
        for section, names in (("checkpoint", ("save", "pretrained_checkpoint")), ("logging", ("tensorboard_dir",))):
            for name in names:
                recipe[section][name] = _last_part(recipe[section][name])
        lines += [
            "## Recipe",
            "",
            f"Stage `{state.stage.name}`, step {state.iteration}, {state.consumed_packs} packs of the shard set with",
            f"digest `{state.manifest_digest}`.",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _tower_phrase(model: ModelConfig, format_name: str) -> str:
    if model.vision is None or format_name == "llm":
        return ""
    tower, tokens = model.vision, model.vision.tokens_per_tile
    return f", an InternViT of {tower.num_layers} layers of width {tower.hidden_size}, {tokens} tokens a tile"


def _last_part(path: str | None) -> str | None:
    """A path without the folders of the machine it was trained on."""
    return Path(path).name if path else path


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
