"""Data mixes: which files, in which form, how many of their records."""

from __future__ import annotations

import dataclasses
import glob
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_vita.config import check_keys, read_yaml
from megatron_vita.data.document import Document
from megatron_vita.data.sample import Sample
from megatron_vita.data.sources.convert import record_to_sample
from megatron_vita.data.sources.readers import Places, Reader, open_reader
from megatron_vita.data.sources.stores import MediaRule, open_store
from megatron_vita.data.sources.table import Row, detect_row, find_row
from megatron_vita.errors import ConfigError, DataError

_GROUP_KEYS = ("ratio", "num", "data_paths", "source", "media_root")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixFile:
    """One file of a data mix."""

    name: str
    """The group's name; with several files, the group's and the file's."""
    written: str
    """The path as the mix writes it, before variables are filled in: the same on every machine."""
    path: Path
    ratio: float
    """Part of the records that is taken; above 1 they repeat."""
    num: int | None
    """Most records that are taken."""
    row: Row
    """How the file is read."""
    media: MediaRule
    """Where its media lie."""

    def reader(self, work: Path | None = None) -> Reader:
        """Open the file.

        Args:
            work: folder for what is unpacked.
        """
        return open_reader(self.path, self.row.read, work)

    def choose(self, places: Places, seed: int) -> Places:
        """The records that `ratio` and `num` take: min(int(total * ratio), num), in file order within each round.

        Which ones is decided by the seed and the file's written path, so that files draw apart and alike everywhere.
        """
        total = len(places)
        wanted = int(total * self.ratio + 1e-9)
        if self.num is not None:
            wanted = min(wanted, self.num)
        rounds, rest = divmod(wanted, total) if total else (0, 0)
        rng = np.random.default_rng([seed, zlib.crc32(self.written.encode())])
        some = np.sort(rng.permutation(total)[:rest])
        return np.concatenate([*([places] * rounds), places[some]]) if wanted else places[:0]


def load_mix(path: str | Path) -> list[MixFile]:
    """Read a data mix: `dataset: {NAME: {ratio, num, data_paths, source, media_root}}`.

    This is Long-VITA's own form plus `source` (a row of the dataset table; else the form is found out from the first
    record) and `media_root`. A group whose ratio or num is 0 is left out. Relative paths start in the working folder;
    a path with `*`, `?` or `[` that is no file's name is a pattern.

    Raises:
        ConfigError: unreadable, an unknown key, a missing file, a form that cannot be told.
    """
    path = Path(path)
    content = read_yaml(path)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_keys(content, ("dataset", "xlsx_sample_num"), str(path))
    groups = content.get("dataset")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{path}: a data mix needs `dataset: {{NAME: {{data_paths: [...]}}}}`.")
    files: list[MixFile] = []
    for name, group in groups.items():
        where = f"{path}: dataset.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("data_paths"), list):
            raise ConfigError(f"{where}: needs `data_paths`, a list of files.")
        check_keys(group, _GROUP_KEYS, where)
        ratio, num = _number(group, "ratio", where), _number(group, "num", where)
        if ratio == 0 or num == 0:
            continue
        found = [
            (written, file)
            for written, expanded in zip(raw["dataset"][name]["data_paths"], group["data_paths"], strict=True)
            for file in _files(str(expanded), where)
        ]
        for written, file in found:
            row = _row(group.get("source"), file, where)
            files.append(
                MixFile(
                    name=f"{name}/{file.name}" if len(found) > 1 else str(name),
                    written=str(written) if Path(str(written)).name == file.name else f"{written}: {file.name}",
                    path=file,
                    ratio=1.0 if ratio is None else ratio,
                    num=None if num is None else int(num),
                    row=row,
                    media=MediaRule(root=_root(group.get("media_root"), row, file, where)),
                )
            )
    names: dict[str, int] = {}
    for number, one in enumerate(files):  # the same file may be listed twice, and is counted twice then
        names[one.name] = names.get(one.name, 0) + 1
        if names[one.name] > 1:
            files[number] = dataclasses.replace(one, name=f"{one.name}#{names[one.name]}")
    if not files:
        raise ConfigError(f"{path}: every group has ratio or num 0; nothing is left to read.")
    return files


def read_samples(
    path: str | Path, *, source: str | None = None, media_root: str | Path | None = None
) -> Iterator[tuple[Sample | Document, Any]]:
    """Every record of one file as (Sample, the record itself), for chat and evaluation: a bad record stops the run.

    Args:
        path: data file.
        source: row of the dataset table; found out from the first record if not given.
        media_root: where relative media paths start; by default the data file's folder.

    Raises:
        ConfigError: no such file, row or form.
        DataError: a bad record; the message names file and record.
    """
    path = Path(path)
    row = _row(source, path, str(path))
    reader = open_reader(path, row.read)
    store = open_store(MediaRule(root=Path(media_root) if media_root is not None else path.parent))
    for line, record in reader.read(reader.index()):
        try:
            if isinstance(record, DataError):
                raise record
            yield record_to_sample(record, row, store=store, source=path.name, line=line)[0], record
        except DataError as error:
            raise DataError(f"{path}, record {line}: {error}") from None


def _row(source: Any, file: Path, where: str) -> Row:
    if source is not None:
        return find_row(str(source), where)
    reader = open_reader(file)
    places = reader.index()
    # broken records at the beginning say nothing about the form
    for _, record in reader.read(places[:50]):
        if not isinstance(record, DataError):
            return detect_row(record, f"{where}: {file}")
    raise ConfigError(f"{where}: {file}: no record can be read, so the form cannot be told. Set `source:`.")


def _root(given: Any, row: Row, file: Path, where: str) -> Path | None:
    if given is not None:
        root = Path(str(given))
        if not root.is_dir():
            raise ConfigError(f"{where}: media_root {root} is no folder.")
        return root
    return {"cwd": Path(), "json_dir": file.parent, "none": None}[row.root]


def _files(text: str, where: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(f"{where}: {path} is a folder. Name its files, for instance {path}/*.json.")
    matches = sorted(Path(one) for one in glob.glob(text, recursive=True)) if glob.has_magic(text) else []
    matches = [one for one in matches if one.is_file()]
    if not matches:
        raise ConfigError(f"{where}: {path}: no such data file. Correct `data_paths`, or fetch the dataset.")
    return matches


def _number(group: dict[str, Any], key: str, where: str) -> float | None:
    """A number of the group; none where it is absent or left empty."""
    value = group.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{where}: `{key}` must be a number of at least 0, got {value!r}.")
    return float(value)
