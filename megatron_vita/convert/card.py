"""The model card of an exported folder: how to load it, what it was made of, the recipe and the data of every stage.

All of it stands in the checkpoint's run.json, so that neither the shards nor earlier checkpoints need to be at hand.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.checkpoint.history import StageRecord
from megatron_vita.checkpoint.state import RunState
from megatron_vita.config import ModelConfig

_PATHS = {
    "data": ("data_path", "valid_data_path", "tokenizer_model"),
    "checkpoint": ("save", "pretrained_checkpoint"),
    "logging": ("tensorboard_dir",),
}
"""Settings that name places on a machine."""
_COUNTS = ("read", "used", "rejected", "truncated", "tokens", "tiles")
"""Columns of a data table after the source's name."""
_PARTS = {"llm": "decoder", "vision": "tower", "model": "whole model"}
_LAYOUT_OF = {"internvl": "internvl", "long_vita": "long_vita"}
"""Token layout that the code which loads a format writes."""
_LOADING = {
    "internvl": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # where this file lies
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```""",
    "llm": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```""",
    "long_vita": """\
**Stock transformers has no class for `long_vita`**, and no code lies in this folder. Long-VITA's own code loads it, and
so does megatron_vita: `python tools/chat.py --model FOLDER --image photo.jpg "What is on the table?"`. For stock
transformers export with `--format internvl`.""",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Contents of a model card."""

    title: str
    format_name: str
    model: ModelConfig
    layout: str | None
    """Token layout of pictures; none for a decoder alone."""
    types: Collection[str]
    """Types of the weights."""
    config_type: str
    """The one that config.json names."""
    weight_bytes: int
    base_models: Mapping[str, str]
    """Name by part (`llm`, `vision` or `model`)."""
    state: RunState | None
    """run.json of the checkpoint, if it was one."""
    files: Mapping[str, str]
    """Descriptions of further files, by name."""


def public_name(folder: str | Path) -> str:
    """Name of a model by its folder: `Qwen/Qwen2.5-14B-Instruct` in the Hub's cache, else the folder's own name."""
    path = Path(os.path.abspath(folder))
    home = path.parent.parent.name
    if path.parent.name == "snapshots" and home.startswith("models--"):
        return home.removeprefix("models--").replace("--", "/")
    return path.name


def write_card(subject: Subject) -> str:
    """README.md of an exported folder."""
    text_only = subject.format_name == "llm"
    bases = {part: name for part, name in subject.base_models.items() if not (text_only and part == "vision")}
    front: dict[str, Any] = {
        "library_name": "megatron_vita" if subject.format_name == "long_vita" else "transformers",
        "pipeline_tag": "text-generation" if text_only else "image-text-to-text",
    }
    if bases:
        front["base_model"] = list(bases.values())
    model = subject.model
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {subject.title}",
        "",
        f"Written by megatron_vita, format `{subject.format_name}`, {subject.weight_bytes / 1e9:.3f} GB of weights:",
        f"{model.num_layers} decoder layers of width {model.hidden_size}{_tower_phrase(model, text_only=text_only)}.",
        "",
        *_type_lines(subject),
        *(_LOADING[subject.format_name], ""),
        *_layout_lines(subject),
        *_origin_lines(bases, subject.state),
        "## Files",
        "",
        *(f"`{name}` {said}" for name, said in subject.files.items()),
        "",
    ]
    history = subject.state.history if subject.state else ()
    if history:
        lines += ["## Data", "", *(line for one in history for line in _data_lines(one))]
        lines += ["## Recipe", ""]
        for one, before in zip(history, (None, *history), strict=False):
            lines += _recipe_lines(one, before)
    return "\n".join(lines)


def _type_lines(subject: Subject) -> list[str]:
    if len(subject.types) < 2:
        return []
    return [
        f"The weights are of types {' and '.join(sorted(subject.types))}. Stock code casts all of them to the one in",
        f"`config.json`, `{subject.config_type}`, which holds every value.",
        "",
    ]


def _layout_lines(subject: Subject) -> list[str]:
    """A warning where the code that loads the format would write other tokens around pictures than in training."""
    written = _LAYOUT_OF.get(subject.format_name)
    if subject.layout is None or written is None:
        return []
    if subject.layout != written:
        whose = "the stock processor" if written == "internvl" else "Long-VITA's own code"
        return [
            f"**Token layout**: trained in the `{subject.layout}` layout, which {whose} cannot write.",
            "Prepare its input with megatron_vita.",
            "",
        ]
    if written == "long_vita":
        return [
            "**Token layout**: trained in the `long_vita` layout (tiles as `<patch>` rows, frames as `<vid>`), which",
            "no stock processor writes.",
            "",
        ]
    return []


def _origin_lines(bases: Mapping[str, str], state: RunState | None) -> list[str]:
    if not bases:
        return []
    lines = ["## Base models", "", *(f"- {_PARTS.get(part, part)}: `{name}`" for part, name in bases.items()), ""]
    if state is not None and not state.history:
        fresh = (
            ""
            if "model" in bases or "vision" not in bases
            else f"; the projector is fresh (seed {state.stage.train.seed})"
        )
        lines += [f"Imported and not trained{fresh}.", ""]
    return lines


def _recipe_lines(record: StageRecord, before: StageRecord | None) -> list[str]:
    """A stage's recipe; of later stages, the settings that differ from the stage before."""
    recipe = _without_folders(record.recipe)
    shown = recipe if before is None else _changed(recipe, _without_folders(before.recipe))
    return [
        f"### {_stage_name(record)}: {record.iteration} steps, {record.consumed_packs} packs",
        "",
        *([] if before is None else [f"Differs from {_stage_name(before)} in:", ""]),
        "```yaml",
        yaml.safe_dump(shown, sort_keys=False).rstrip(),
        "```",
        "",
    ]


def _without_folders(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that name places on a machine, cut to their last part."""
    out = {key: dict(one) if isinstance(one, Mapping) else one for key, one in recipe.items()}
    for section, names in _PATHS.items():
        for name in names:
            path = out[section].get(name) if isinstance(out.get(section), dict) else None
            if path:
                out[section][name] = Path(str(path)).name
    return out


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `now` that are different or missing in `before`."""
    out: dict[str, Any] = {}
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = _changed(value, old)
            if value:
                out[key] = value
        elif key not in before or value != old:
            out[key] = value
    return out


def _data_lines(record: StageRecord) -> list[str]:
    """A stage's shard set, as its manifest describes it."""
    data = record.data
    lines = [
        f"### {_stage_name(record)}",
        "",
        f"Manifest digest `{record.manifest_digest}`, {record.consumed_packs} packs of it taken"
        + (f", sequences of {data.seq_length} tokens, layout `{data.layout}`." if data else "."),
        "",
    ]
    if data is None:
        return lines
    lines += [f"| source | {' | '.join(_COUNTS)} |", "|" + "---|" * (len(_COUNTS) + 1)]
    for source in data.sources:
        cells = [source.name, *(getattr(source, name) for name in _COUNTS)]
        lines.append(f"| {' | '.join(_one_line(cell) for cell in cells)} |")
    return [*lines, ""]


def _one_line(cell: object) -> str:
    """A text escaped for a cell of a Markdown table."""
    return " ".join(str(cell).replace("|", " ").split())


def _stage_name(record: StageRecord) -> str:
    return _one_line(record.recipe.get("name", "stage"))


def _tower_phrase(model: ModelConfig, *, text_only: bool) -> str:
    if model.vision is None or text_only:
        return ""
    tower, tokens = model.vision, model.vision.tokens_per_tile
    return f", an InternViT of {tower.num_layers} layers of width {tower.hidden_size}, {tokens} tokens a tile"
