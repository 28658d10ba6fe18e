"""The groups of a data mix file, and what their paths come to on this disk. Nothing is opened."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.config import check_keys, read_yaml
from megatron_vita.data.sources.media_store.store import MediaRule, list_archives
from megatron_vita.data.sources.registry import DatasetSpec, find_row
from megatron_vita.errors import ConfigError

_GROUP_KEYS = (
    "ratio", "num", "data_paths", "source", "media_root", "archives", "rewrite", "fields", "fix",
)  # fmt: skip
_TOP_KEYS = ("dataset", "include", "xlsx_sample_num", "do_dataset_cast", "do_dataset_format")
"""The last three are Long-VITA's and steer nothing that we do: a preview, and two that its code does not use either."""
_DEEPEST = 8
"""Mixes that include one another, at most."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of a data mix."""

    name: str
    where: str
    """For messages: mix file and group."""
    ratio: float
    num: int | None
    paths: tuple[tuple[str, str], ...]
    """(as the mix writes it, with variables filled in)."""
    row: DatasetSpec | None = None
    """The row that `source` names; none: told from the records."""
    media_root: Path | None = None
    archives: tuple[str, ...] | None = None
    """Patterns in place of the row's."""
    rewrite: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    fix: tuple[str, ...] = ()

    @property
    def used(self) -> bool:
        """Is anything taken of it? Ratio or num 0 leaves a group out."""
        return self.ratio > 0 and self.num != 0

    def found(self) -> list[tuple[str, list[Path]]]:
        """(path as written, the files it names) for each path that names any."""
        return [(written, files) for written, text in self.paths if (files := find_files(text))]

    def problems(self) -> list[str]:
        """What is missing on this disk, in words."""
        out = []
        for _, text in self.paths:
            if Path(text).is_dir():
                out.append(f"{text} is a folder. Name its files, for instance {text}/*.json.")
            elif not find_files(text):
                out.append(f"{text}: no such data file. {nearest(text)}")
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
        """The row with the group's own fields and fixes."""
        if not self.fields and not self.fix:
            return row
        return dataclasses.replace(row, fields={**row.fields, **self.fields}, fix=(*row.fix, *self.fix))

    def media(self, row: DatasetSpec, file: Path) -> MediaRule:
        """Where the media of a data file lie."""
        root = self.media_root
        if root is None:
            root = {"cwd": Path(), "json_dir": file.parent, "dataset": row.dataset_root(file)}.get(row.root)
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
        )


def read_groups(path: Path) -> list[Group]:
    """Every group of a data mix, those that are not used too.

    `include: FILE` (or a list, relative to this file) takes the groups of other mixes; what this mix says of a group
    of the same name goes over it, key by key.

    Raises:
        ConfigError: unreadable, an unknown key, a value of the wrong type.
    """
    expanded, raw = _merged(path, 0)
    if not expanded:
        raise ConfigError(f"{path}: a data mix needs `dataset: {{NAME: {{data_paths: [...]}}}}`.")
    return [_group(path, str(name), values, raw[name]) for name, values in expanded.items()]


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


def nearest(text: str) -> str:
    """The existing name that is most like a path that does not exist."""
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
    """Groups with variables filled in, and as they are written; those of included mixes below the mix's own."""
    if depth > _DEEPEST:
        raise ConfigError(f"{path}: mixes include one another without end.")
    content = read_yaml(path)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_keys(content, _TOP_KEYS, str(path))
    included = content.get("include") or []
    expanded_groups: dict[Any, Any] = {}
    raw_groups: dict[Any, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        expanded, written = _merged(path.parent / str(name), depth + 1)
        _lay_over(expanded_groups, expanded)
        _lay_over(raw_groups, written)
    own = content.get("dataset") or {}
    if not isinstance(own, dict) or any(not isinstance(group, dict) for group in own.values()):
        raise ConfigError(f"{path}: a data mix needs `dataset: {{NAME: {{data_paths: [...]}}}}`.")
    if included:
        check_keys([name for name, one in own.items() if "data_paths" not in one], expanded_groups, f"{path}: dataset")
    _lay_over(expanded_groups, own)
    _lay_over(raw_groups, raw.get("dataset") or {})
    return expanded_groups, raw_groups


def _lay_over(below: dict[Any, Any], above: Mapping[Any, Any]) -> None:
    for name, group in above.items():
        below[name] = {**below.get(name, {}), **group}


def _group(path: Path, name: str, values: Mapping[str, Any], raw: Mapping[str, Any]) -> Group:
    where = f"{path}: dataset.{name}"
    check_keys(values, _GROUP_KEYS, where)
    ratio, num = _number(values, "ratio", where), _number(values, "num", where)
    paths = values.get("data_paths")
    group = Group(
        name=name, where=where, ratio=1.0 if ratio is None else ratio, num=None if num is None else int(num), paths=()
    )
    if not group.used:  # what it lists need not even be a list
        return group
    if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
        raise ConfigError(f"{where}: needs `data_paths`, a list of files.")
    given = {key: _checked(values, key, kind, where) for key, kind in _KINDS.items() if values.get(key) is not None}
    return dataclasses.replace(
        group,
        paths=tuple(zip(map(str, raw["data_paths"]), paths, strict=True)),
        row=find_row(given["source"], where) if "source" in given else None,
        media_root=Path(given["media_root"]) if "media_root" in given else None,
        archives=tuple(given["archives"]) if "archives" in given else None,
        rewrite=given.get("rewrite", {}),
        fields=given.get("fields", {}),
        fix=tuple(given.get("fix", ())),
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
    """A number of the group; none where it is absent or left empty."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{where}: `{key}` must be a number of at least 0, got {value!r}.")
    return float(value)
