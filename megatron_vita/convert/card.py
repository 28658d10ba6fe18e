"""The model card of an exported folder: how to load it, what it was made of, the recipe and the data of every stage.

All of it stands in the checkpoint's run.json, so that neither the shards nor earlier checkpoints need to be at hand.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_vita.checkpoint.state import RunState
from megatron_vita.config import ModelConfig

_TEMPLATE = Path(__file__).with_name("card.jinja")
_PATHS = {
    "data": ("data_path", "valid_data_path", "tokenizer_model"),
    "checkpoint": ("save", "pretrained_checkpoint"),
    "logging": ("tensorboard_dir",),
}
"""Settings that name places on a machine."""
_COUNTS = ("read", "used", "rejected", "truncated", "tokens", "tiles")
"""Columns of a data table after the source's name."""


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
    history = subject.state.history if subject.state else ()
    recipes = [_without_folders(one.recipe) for one in history]
    changes = [
        now if before is None else _changed(now, before) for now, before in zip(recipes, [None, *recipes], strict=False)
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["one_line"] = _one_line
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        it=subject,
        front=_yaml(front),
        model=subject.model,
        tower=None if text_only else subject.model.vision,
        bases=bases,
        history=history,
        recipes=[_yaml(one) for one in changes],
        counts=_COUNTS,
    )
    return text.rstrip("\n") + "\n"


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False).rstrip()


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


def _one_line(cell: object) -> str:
    """A text escaped for a cell of a Markdown table."""
    return " ".join(str(cell).replace("|", " ").split())
