"""The dataset table: one row for each dataset, all configuration, no class."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.data.sample import Role
from megatron_vita.data.sources.fixes import find_fix
from megatron_vita.data.sources.mappers import MAPPERS
from megatron_vita.data.sources.readers import KINDS
from megatron_vita.errors import ConfigError

ROLES: dict[str, Role] = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Role as datasets write it -> ours."""
ROOTS = ("cwd", "json_dir", "none")


@dataclass(frozen=True, kw_only=True)
class Row:
    """How to read one dataset."""

    name: str
    read: str = "auto"
    """Reader: auto, json, jsonl, parquet."""
    map: str
    """Mapper."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Field names that the mapper asks for."""
    image: tuple[str, ...] = ()
    """Fields that may hold pictures (path, list, struct {bytes, path}, list of structs); the first that is not null."""
    video: tuple[str, ...] = ()
    """Fields that may hold videos."""
    root: str = "none"
    """Where relative media paths start, unless the mix says `media_root`: `cwd`, `json_dir` (the data file's folder),
    or `none` (media are embedded)."""
    fix: tuple[str, ...] = ()
    """Fixes in order."""


@lru_cache(maxsize=1)
def load_table() -> dict[str, Row]:
    """Every row of table.yaml by name.

    Raises:
        ConfigError: the table is wrong (a mistake in the package, not the user's).
    """
    content = yaml.safe_load(Path(__file__).with_name("table.yaml").read_text(encoding="utf-8"))
    rows: dict[str, Row] = {}
    known = {one.name for one in dataclasses.fields(Row)}
    for name, values in content["datasets"].items():
        values = dict(values)
        base = values.pop("like", None)
        if base:
            inherited = {one: getattr(rows[base], one) for one in known}
            values = {**inherited, **values}
        values["name"] = name
        for key in ("image", "video", "fix"):
            given = values.get(key, ())
            values[key] = (given,) if isinstance(given, str) else tuple(given)
        row = Row(**values)
        if row.map not in MAPPERS or row.read not in ("auto", *KINDS) or row.root not in ROOTS:
            raise ConfigError(f"table.yaml: {name}: no such mapper, reader or root.")
        for fix in row.fix:
            find_fix(fix)
        rows[name] = row
    return rows


def find_row(name: str, where: str) -> Row:
    """A row by name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    table = load_table()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(table)}."
        raise ConfigError(f"{where}: no source `{name}` in the dataset table. {hint}")
    return table[name]


def detect_row(record: Any, where: str) -> Row:
    """The generic row that fits a record, for mixes that name no `source`.

    Raises:
        ConfigError: the form is not known, or could be several.
    """
    name = _generic(record)
    if name is None:
        keys = ", ".join(sorted(record)[:12]) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(
            f"{where}: cannot tell the form of the records (fields: {keys}). Set `source:` in the data mix to one of "
            f"{', '.join(load_table())}."
        )
    return load_table()[name]


def _generic(record: Any) -> str | None:
    if isinstance(record, list):
        return "long_vita" if record and all(isinstance(turn, dict) and "role" in turn for turn in record) else None
    if not isinstance(record, dict):
        return None
    for key in ("messages", "conversations", "items"):
        turns = record.get(key)
        if not isinstance(turns, list) or not turns:
            continue
        if isinstance(turns[0], str):
            return "lima" if key == "conversations" else None
        if not isinstance(turns[0], dict):
            return None
        if any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns):
            return "openai"
        if "role" in turns[0] and key != "items":
            return "long_vita"
        if "from" in turns[0]:
            return "llava" if record.get("image") is not None or record.get("video") is not None else "sharegpt"
    if isinstance(record.get("texts"), list):
        return "the_cauldron"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if isinstance(record.get("text"), str) and not {"prompt", "question", "query", "input"} & set(record):
        return "text"
    return None
