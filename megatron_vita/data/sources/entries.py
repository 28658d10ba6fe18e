"""Reads the dataset entries of a data mix and resolves their paths on this disk. No data file is opened."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.config import check_keys, read_yaml
from megatron_vita.data.sources.media_store.store import MediaRule, list_archives
from megatron_vita.data.sources.registry import DatasetSpec, find_row
from megatron_vita.errors import ConfigError

_ENTRY_KEYS = (
    "ratio", "num", "data_paths", "source", "media_root", "archives", "rewrite", "fields", "fix", "frame_rate",
)  # fmt: skip
_TOP_KEYS = ("dataset", "include", "xlsx_sample_num", "do_dataset_cast", "do_dataset_format")
"""The last three are Long-VITA's and steer nothing that we do: a preview, and two that its code does not use either."""
_SHOWN = {"cwd": "the working folder", "json_dir": "the data file's folder", "dataset": "the dataset's folder"}
"""Names of media roots in messages."""
_DEEPEST = 8
"""Maximum depth of nested includes."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One dataset entry of a data mix."""

    name: str
    where: str
    """For messages: mix file and entry."""
    ratio: float
    num: int | None
    paths: tuple[tuple[str, str], ...]
    """(path as the mix writes it, the same on every machine; path with variables expanded)."""
    row: DatasetSpec | None = None
    """The row that `source` names; None: detected from the records."""
    media_root: Path | None = None
    media_written: str = ""
    """`media_root` as the mix writes it; nothing if that and all `data_paths` are absolute."""
    archives: tuple[str, ...] | None = None
    """Patterns in place of the row's."""
    rewrite: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    fix: tuple[str, ...] = ()
    frame_rate: float | None = None

    @property
    def used(self) -> bool:
        """Whether records of the entry are used: neither ratio nor num is 0."""
        return self.ratio > 0 and self.num != 0

    def found(self) -> list[tuple[str, list[Path]]]:
        """(path as written, the files it names) for each path that names any."""
        return [(written, files) for written, text in self.paths if (files := find_files(text))]

    def missing(self) -> list[str]:
        """The paths that name no file and no folder."""
        return [text for _, text in self.paths if not find_files(text) and not find_folders(text)]

    def problems(self, *, paths: bool = True) -> list[str]:
        """What is missing on this disk, in words; with `paths`, data files that are not there, too."""
        out = [f"{text}: no such data file. {nearest(text)}" for text in self.missing()] if paths else []
        for _, text in self.paths:
            if not find_files(text) and (folders := find_folders(text)):
                names = f"is a folder. Name its files, for instance {text}/*.json."
                if str(folders[0]) != text:
                    names = f"names folders ({folders[0]}) and no files. For instance {text}/*.json."
                out.append(f"{text} {names}")
        if not self.paths:
            out.append("`data_paths` is empty. Name its files, or set `ratio: 0`.")
        if self.media_root is not None and not self.media_root.is_dir():
            out.append(f"media_root {self.media_root} is no folder. {nearest(str(self.media_root))}")
        elif self.media_root is None and self.row is not None and self.row.root == "user":
            out.append(f"source `{self.row.name}` comes without its media. Set `media_root` to where they lie.")
        elif self.archives is not None:
            roots = {self.media(self.row, file).root for _, files in self.found() for file in files} if self.row else ()
            for root in [self.media_root] if self.media_root else roots:
                out += [
                    f"archives {pattern}: no such archive under {root}."
                    for pattern in self.archives
                    if root is not None and not list_archives(root, [pattern])
                ]
        return out

    def fitted(self, row: DatasetSpec) -> DatasetSpec:
        """The row with the entry's own fields, fixes and frame rate."""
        if not self.fields and not self.fix and self.frame_rate is None:
            return row
        rate = row.frame_rate if self.frame_rate is None else self.frame_rate
        fields = {**row.fields, **self.fields}
        return dataclasses.replace(row, fields=fields, fix=(*row.fix, *self.fix), frame_rate=rate)

    def media(self, row: DatasetSpec, file: Path) -> MediaRule:
        """The media rule of a data file."""
        root, place, shown = self.media_root, self.media_written, self.media_written
        if not shown or os.path.isabs(shown):
            shown = "`media_root`"
        if root is None:
            root = {"cwd": Path(), "json_dir": file.parent, "dataset": row.dataset_root(file)}.get(row.root)
            place, shown = row.root, _SHOWN.get(row.root, "")
        if root is None:
            return MediaRule()
        folder = row.folders.get(file.name.partition(".")[0])
        patterns = row.archives if self.archives is None else self.archives
        rewrite = (*self.rewrite.items(), *row.rewrite.items())
        return MediaRule(
            root=root,
            archives=list_archives(root, [one.format(folder=folder) for one in patterns]) if patterns else (),
            resolve=row.resolve,
            rewrite=(*rewrite, ("", f"{folder}/")) if folder else rewrite,
            frames=row.frames,
            frame_rate=row.frame_rate if self.frame_rate is None else self.frame_rate,
            place=place or os.path.relpath(root, file.parent),  # data and media may be moved together
            shown=shown,
        )


def read_entries(path: Path) -> list[DatasetEntry]:
    """Every dataset entry of a data mix, those that are not used too.

    `include: FILE` (or a list, relative to this file) takes the entries of other mixes; what this mix says of an entry
    of the same name goes over it, key by key.

    Raises:
        ConfigError: unreadable, an unknown key, a value of the wrong type.
    """
    expanded, raw = _merged(path, 0)
    if not expanded:
        raise ConfigError(f"{path}: a data mix needs `dataset: {{NAME: {{data_paths: [...]}}}}`.")
    entries = [_entry(path, str(name), values, raw[name]) for name, values in expanded.items()]
    absolute = [written for one in entries for written, _ in one.paths if os.path.isabs(written)]
    top = os.path.commonpath(map(os.path.dirname, absolute)) if absolute else ""
    return [dataclasses.replace(one, paths=tuple(_portable(*pair, top) for pair in one.paths)) for one in entries]


def _portable(written: str, text: str, top: str) -> tuple[str, str]:
    """A path as the mix writes it; an absolute one below the folder that all of the mix have in common."""
    return os.path.relpath(written, top) if os.path.isabs(written) else written, text


def find_files(text: str) -> list[Path]:
    """The files that a path of a mix names, in order. What exists is never taken for a pattern, folder by folder."""
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir() or not glob.has_magic(text):
        return []
    known = Path(path.anchor)
    rest = list(path.parts[1:] if path.anchor else path.parts)
    while rest and (known / rest[0]).exists():
        known /= rest.pop(0)
    matches = glob.glob("/".join(rest), root_dir=known, recursive=True)
    return sorted(one for match in matches if (one := known / match).is_file())


def find_folders(text: str) -> list[Path]:
    """The folders that a path of a mix names."""
    if Path(text).is_dir():
        return [Path(text)]
    return sorted(path for path in map(Path, glob.glob(text, recursive=True)) if path.is_dir())


def nearest(text: str) -> str:
    """A hint with the existing name most similar to a missing path."""
    path = Path(text)
    parts = list(path.parts)
    known = Path(parts.pop(0)) if path.anchor else Path()
    while parts and (known / parts[0]).exists():
        known /= parts.pop(0)
    if not parts:
        return "Correct the path."
    names = sorted(one.name for one in known.iterdir()) if known.is_dir() else []
    close = difflib.get_close_matches(parts[0], names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {known / close[0]}?"
    return f"{known} exists, {parts[0]} in it does not. Correct the path, or fetch the dataset."


def _merged(path: Path, depth: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Entries with variables filled in, and as they are written; those of included mixes below the mix's own."""
    if depth > _DEEPEST:
        raise ConfigError(f"{path}: mixes include one another without end.")
    content = read_yaml(path)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_keys(content, _TOP_KEYS, str(path))
    included = content.get("include") or []
    expanded_entries: dict[Any, Any] = {}
    raw_entries: dict[Any, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        expanded, written = _merged(path.parent / str(name), depth + 1)
        _lay_over(expanded_entries, expanded)
        _lay_over(raw_entries, written)
    own = content.get("dataset") or {}
    if not isinstance(own, dict) or any(not isinstance(one, dict) for one in own.values()):
        raise ConfigError(f"{path}: a data mix needs `dataset: {{NAME: {{data_paths: [...]}}}}`.")
    if included:
        check_keys([name for name, one in own.items() if "data_paths" not in one], expanded_entries, f"{path}: dataset")
    _lay_over(expanded_entries, own)
    _lay_over(raw_entries, raw.get("dataset") or {})
    return expanded_entries, raw_entries


def _lay_over(below: dict[Any, Any], above: Mapping[Any, Any]) -> None:
    for name, entry in above.items():
        below[name] = {**below.get(name, {}), **entry}


def _entry(path: Path, name: str, values: Mapping[str, Any], raw: Mapping[str, Any]) -> DatasetEntry:
    where = f"{path}: dataset.{name}"
    check_keys(values, _ENTRY_KEYS, where)
    ratio, num = _number(values, "ratio", where), _number(values, "num", where)
    paths = values.get("data_paths")
    entry = DatasetEntry(
        name=name, where=where, ratio=1.0 if ratio is None else ratio, num=None if num is None else int(num), paths=()
    )
    if not entry.used:  # what it lists need not even be a list
        return entry
    if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
        raise ConfigError(f"{where}: needs `data_paths`, a list of files.")
    given = {key: _checked(values, key, kind, where) for key, kind in _KINDS.items() if values.get(key) is not None}
    written = str(raw.get("media_root") or "")
    listed = [str(one) for one in raw["data_paths"]]
    if os.path.isabs(written) and all(map(os.path.isabs, listed)):
        written = ""
    return dataclasses.replace(
        entry,
        paths=tuple(zip(listed, paths, strict=True)),
        row=find_row(given["source"], where) if "source" in given else None,
        media_root=Path(given["media_root"]) if "media_root" in given else None,
        media_written=written,
        archives=tuple(given["archives"]) if "archives" in given else None,
        rewrite=given.get("rewrite", {}),
        fields=given.get("fields", {}),
        fix=tuple(given.get("fix", ())),
        frame_rate=_number(values, "frame_rate", where) or None,
    )


_KINDS: dict[str, str] = {
    "source": "text", "media_root": "text", "archives": "a list of texts", "rewrite": "a mapping",
    "fields": "a mapping", "fix": "a list of texts",
}  # fmt: skip


def _checked(values: Mapping[str, Any], key: str, kind: str, where: str) -> Any:
    value = values[key]
    right = {
        "text": isinstance(value, str),
        "a mapping": isinstance(value, dict),
        "a list of texts": isinstance(value, list) and all(isinstance(one, str) for one in value),
    }
    if not right[kind]:
        raise ConfigError(f"{where}: `{key}` must be {kind}, got {value!r}.")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """A number of the entry; none where it is absent or left empty."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{where}: `{key}` must be a number of at least 0, got {value!r}.")
    return float(value)
