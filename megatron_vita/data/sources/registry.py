"""The dataset table: one row for each dataset, all configuration, no class."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase as fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_vita.data.sources.fields import load_own
from megatron_vita.data.sources.fixes import find_fix
from megatron_vita.data.sources.mappers import MAPPERS
from megatron_vita.data.sources.media_store.store import RESOLVE
from megatron_vita.data.sources.readers import KINDS
from megatron_vita.errors import ConfigError

ROOTS = ("cwd", "json_dir", "dataset", "user", "none")
_READERS = ("auto", *KINDS)
_TUPLES = ("files", "image", "video", "archives", "fix")
_ABOUT_FILES = ("hub", "files", "root", "folders", "resolve", "rewrite", "archives", "frames")
_ABOUT_FETCHING = ("gated", "built_by", "media_from")
"""Fields that say where a dataset and its media are found, and nothing of its records."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """How to read one dataset."""

    name: str
    hub: str = ""
    """Where its publisher keeps it; a mix looks for it in a folder of this name."""
    files: tuple[str, ...] = ()
    """The publisher's data files: patterns relative to the dataset's root, which is found by them."""
    read: str = "auto"
    """Reader: `auto`, or one of readers.KINDS."""
    map: str
    """Mapper."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Field names that the mapper asks for."""
    image: tuple[str, ...] = ()
    """Fields that may hold pictures (path, list, struct {bytes, path}, list of structs); the first that is not null."""
    video: tuple[str, ...] = ()
    """Fields that may hold videos."""
    media: bool = False
    """Every record holds media: one without is rejected, and so no placeholder is taken for text."""
    root: str = "none"
    """Root of relative media paths, unless the mix says `media_root`: `cwd`, `json_dir` (the data file's folder),
    `dataset` (the dataset's root), `user` (the mix must say it), or `none` (media are embedded)."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Data file's name without ending -> folder below the root that its media lie in."""
    resolve: str = "path"
    """What a reference is: `path`, `stem` or `name`, see MediaRule."""
    rewrite: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a reference -> what stands there instead, before it is looked for."""
    archives: tuple[str, ...] = ()
    """Archives with media, looked into as far as they are there: patterns relative to the root. `{folder}` is the
    file's folder in `folders`."""
    frames: bool = False
    """References may name folders of frames inside archives."""
    frame_rate: float = 1.0
    """Pictures of a folder of frames that make a second."""
    fix: tuple[str, ...] = ()
    """Fixes in order."""
    gated: bool = False
    """Its publisher asks to accept terms before it can be fetched."""
    built_by: str = ""
    """Command that makes it, where its publisher ships no data files."""
    media_from: str = ""
    """Where its media come from, if not with the data files."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("map", self.map, tuple(MAPPERS)),
            ("read", self.read, _READERS),
            ("root", self.root, ROOTS),
            ("resolve", self.resolve, RESOLVE),
        ):
            if value not in known:
                raise ConfigError(f"source `{self.name}`: no such {name}: {value!r}. Choose {', '.join(known)}.")
        for fix in self.fix:
            find_fix(fix)

    @property
    def form(self) -> dict[str, Any]:
        """Settings that decide the conversion of a record, without those of media locations."""
        names = (one.name for one in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in _ABOUT_FILES + _ABOUT_FETCHING}

    def dataset_root(self, file: Path) -> Path:
        """The folder of a publisher's dataset that a data file belongs to; the file's own if its name is another."""
        whole = Path(os.path.abspath(file))  # so that it is found from inside the dataset, too
        for pattern in self.files:
            depth = pattern.count("/") + 1
            if len(whole.parts) > depth and fnmatch("/".join(whole.parts[-depth:]), pattern):
                return whole.parents[depth - 1]
        return file.parent

    def published(self, file: Path) -> bool:
        """Whether the file has one of the publisher's names; True if none is known."""
        parts = Path(os.path.abspath(file)).parts
        tails = ("/".join(parts[-(pattern.count("/") + 1) :]) for pattern in self.files)
        return not self.files or any(map(fnmatch, tails, self.files))


@lru_cache(maxsize=1)
def load_table() -> dict[str, DatasetSpec]:
    """Every row of table.yaml by name.

    Raises:
        ConfigError: the table is wrong (a mistake in the package, not the user's).
    """
    rows: dict[str, DatasetSpec] = {}
    known = {one.name for one in dataclasses.fields(DatasetSpec)}
    for name, values in load_own("table.yaml")["datasets"].items():
        values = dict(values)
        base = values.pop("like", None)
        inherited = {one: getattr(rows[base], one) for one in known} if base else {}
        for key in _TUPLES:
            if key in values:
                values[key] = (values[key],) if isinstance(values[key], str) else tuple(values[key])
        rows[name] = DatasetSpec(**{**inherited, **values, "name": name})
    return rows


def find_row(name: str, where: str) -> DatasetSpec:
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


def detect_row(record: Any, where: str) -> DatasetSpec:
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
