"""A checkpoint -> a complete Hugging Face folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.checkpoint.dtypes import FLOAT32, DType
from megatron_vita.checkpoint.journal import check_room
from megatron_vita.checkpoint.lazy import LazyTensors
from megatron_vita.checkpoint.state import RunState
from megatron_vita.checkpoint.streams import Workers, byte_bar, default_workers, digest_of
from megatron_vita.config import IMAGE_NORMS, ModelConfig, VisionConfig, to_dict
from megatron_vita.convert import decoders, internvl, long_vita
from megatron_vita.convert.coverage import REPORT_FILE, account
from megatron_vita.convert.hf_config import read_json, write_json
from megatron_vita.convert.identity import identity_of
from megatron_vita.convert.opening import SIDECAR, OpenModel, open_model
from megatron_vita.convert.publish import check_free, new_folder
from megatron_vita.convert.safetensors_writer import MAX_SHARD_BYTES, plan_shards, write_safetensors
from megatron_vita.convert.tokenizer_files import copy_for_export
from megatron_vita.convert.views import MoreRows, Subset, TheirView
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.tokenizer import END_OF_TEXT, IM_END

log = logging.getLogger(__name__)

DIGESTS_FILE = "XXH128SUMS"
"""XXH3 (128 bits) of all files of an exported folder, as `xxh128sum --check` reads them."""
VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
FORMATS = ("internvl", "long_vita", "llm")
_FAMILIES: dict[str, Any] = {"internvl": internvl, "long_vita": long_vita, "llm": decoders}
_BICUBIC = 3
"""PIL's number."""
_PATHS = {
    "data": ("data_path", "valid_data_path", "tokenizer_model"),
    "checkpoint": ("save", "pretrained_checkpoint"),
    "logging": ("tensorboard_dir",),
}
"""Settings that name places on a machine."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    format_name: str,
    *,
    tokenizer: str | Path | None = None,
    dtype: DType | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    vocabulary_multiple: int = 1,
    overwrite: bool = False,
    workers: int | None = None,
    durable: bool = False,
    progress: bool = False,
) -> Path:
    """Write the weights of a checkpoint (or of any model that open_model opens) as a Hugging Face folder.

    Args:
        format_name: `internvl` (stock transformers loads it), `long_vita` (the published names) or `llm` (the decoder).
        tokenizer: tokenizer folder, by default the one inside the checkpoint.
        dtype: convert the weights; by default they keep their type.
        max_shard_bytes: most bytes of tensors in one file.
        vocabulary_multiple: pad the vocabulary with rows of zeros to a multiple of this; by default no row is padding.
        workers: threads, by default as many as there are cores.
        durable: wait until the disk has everything.
        progress: show a bar on standard error.

    Returns:
        `output`.

    Raises:
        CheckpointError, ConfigError: the model does not fit the format, or the checkpoint is damaged. Nothing is
            published then.
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    opened = open_model(checkpoint)
    model, family = opened.model, _FAMILIES[format_name]
    source: LazyTensors = opened.tensors
    if format_name == "llm":
        source = Subset(source, [name for name in source if name.startswith("language_model.")])
    family.check_exportable(model)
    rows = -(-model.vocab_size // vocabulary_multiple) * vocabulary_multiple
    if rows != model.vocab_size:
        model, source = replace(model, vocab_size=rows), MoreRows(source, VOCABULARY, rows, mean=False)
    tensors = TheirView(family.rules(model), source, str(opened.path), dtype)
    coverage = account(tensors)
    files = plan_shards(tensors, max_shard_bytes)
    vision = None if format_name == "llm" else model.vision
    identity = {
        "source": identity_of(opened.path),
        "format": format_name,
        "files": hashlib.sha256(b"".join(one.header for one in files)).hexdigest(),
    }
    check_room(output.parent, sum(one.size for one in files), output.parent / f".writing-{output.name}")
    with new_folder(output, overwrite=overwrite, identity=identity) as journal:
        folder = journal.staging
        tokenizer_dir = Path(tokenizer) if tokenizer else opened.tokenizer_dir
        ids = copy_for_export(tokenizer_dir, folder, vision=vision is not None)
        stored = holds_all({tensors.dtype(name) for name in tensors}).name
        write_json(folder / "config.json", family.write_config(model, stored, ids))
        write_json(folder / "generation_config.json", _generation(ids))
        if vision is not None:
            spec = opened.preprocess or PreprocessSpec.for_tower(vision)
            for name, values in processor_files(vision, spec).items():
                write_json(folder / name, values)
        card = _card(output.name, opened, format_name, coverage.target_bytes)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / REPORT_FILE).write_text(coverage.to_json(), encoding="utf-8")
        total = sum(one.data_bytes for one in files)
        with Workers(workers or default_workers()) as pool, byte_bar(total, show=progress) as bar:
            digests = write_safetensors(journal, tensors, files, pool, bar.update, durable=durable)
        write_digests(folder, digests)
    log.info("coverage: %s", coverage.summary())
    return output


def holds_all(kinds: Collection[DType]) -> DType:
    """The type in which stock code loads weights without loss: it casts all of them to the one that config.json names.

    Returns:
        The only type there is, or the smallest one that has every value of all of them.
    """
    wide = max(kinds, key=lambda one: one.itemsize)
    same_size = {one for one in kinds if one.itemsize == wide.itemsize}
    return wide if len(same_size) == 1 else FLOAT32  # bfloat16 and float16 hold neither each other's values


def write_digests(folder: Path, known: Mapping[str, str]) -> None:
    """Write XXH128SUMS over all files of a folder, hashing those whose digest is not known yet."""
    lines = []
    for path in sorted(one for one in folder.iterdir() if one.is_file() and one.name != DIGESTS_FILE):
        digest = known.get(path.name) or digest_of(path, 0, path.stat().st_size)
        lines.append(f"{digest}  {path.name}\n")
    (folder / DIGESTS_FILE).write_text("".join(lines), encoding="utf-8")


def processor_files(vision: VisionConfig, spec: PreprocessSpec) -> dict[str, dict[str, Any]]:
    """Settings of the image, video and joint processors by file name; all written out, because no default fits."""
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
        "processor_config.json": {**processor, "image_seq_length": vision.tokens_per_tile},
        SIDECAR: {"format_version": 1, "preprocess": spec.to_dict()},
    }


def _generation(ids: Mapping[str, int]) -> dict[str, Any]:
    """Greedy by default: answers end at the end of a turn or of a text."""
    ends = [ids[name] for name in (IM_END, END_OF_TEXT) if name in ids]
    return {"eos_token_id": ends, "pad_token_id": ids.get(END_OF_TEXT), "bos_token_id": ids.get(END_OF_TEXT)}


def _card(title: str, opened: OpenModel, format_name: str, size: int) -> str:
    """The model card: what it is, how to load it, and the recipe that made it."""
    model = opened.model
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if format_name == 'llm' else 'image-text-to-text'}",
        "---",
        "",
        f"# {title}",
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
    lines += [
        "## Files",
        "",
        f"`{DIGESTS_FILE}` holds the digests of all files (`xxh128sum --check {DIGESTS_FILE}`).",
        f"`{REPORT_FILE}` says which stored tensors each tensor was made of.",
        "",
    ]
    if opened.state is not None:
        lines += _recipe_lines(opened.state)
        lines += _data_lines(opened.state)
    return "\n".join(lines)


def _recipe_lines(state: RunState) -> list[str]:
    """The recipe as the card shows it, without the folders of the machine it was trained on."""
    recipe = to_dict(state.stage)
    for section, names in _PATHS.items():
        for name in names:
            path = recipe[section][name]
            recipe[section][name] = Path(path).name if path else path
    return [
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


def _data_lines(state: RunState) -> list[str]:
    """What it was trained on: the shard set's manifest, if it still lies where the recipe says and is the same."""
    manifest = Path(f"{state.stage.data.data_path}.json")
    if not state.manifest_digest or not manifest.is_file():
        return []
    values = read_json(manifest)
    if values.get("digest") != state.manifest_digest:
        return []
    lines = [
        "## Data",
        "",
        f"Manifest `{manifest.name}`, digest `{state.manifest_digest}`,",
        f"sequences of {values.get('seq_length')} tokens.",
        "",
        "| source | records read | used | tokens | tiles |",
        "|---|---|---|---|---|",
    ]
    for source in values.get("sources", ()):
        cells = [str(source.get(name, "")) for name in ("name", "read", "used", "tokens", "tiles")]
        lines.append(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |")
    return [*lines, ""]


def _tower_phrase(model: ModelConfig, format_name: str) -> str:
    if model.vision is None or format_name == "llm":
        return ""
    tower, tokens = model.vision, model.vision.tokens_per_tile
    return f", an InternViT of {tower.num_layers} layers of width {tower.hidden_size}, {tokens} tokens a tile"
