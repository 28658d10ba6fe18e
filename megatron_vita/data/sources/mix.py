"""Data mixes: data files, their forms, and the number of records used of each."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.sample import Document, Sample
from megatron_vita.data.sources.entries import DatasetEntry, read_entries
from megatron_vita.data.sources.media_store.store import MediaRule, open_store
from megatron_vita.data.sources.readers import Reader, RecordOffsets, open_reader
from megatron_vita.data.sources.registry import DatasetSpec, detect_row, find_row
from megatron_vita.data.sources.to_sample import record_to_sample
from megatron_vita.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class MixFile:
    """One file of a data mix."""

    name: str
    """The dataset entry's name; with several files, the entry's and the file's."""
    written: str
    """The path as the mix writes it, before variables are filled in, and an absolute one without the folders that all
    of the mix have in common: the same on every machine."""
    path: Path
    ratio: float
    """Share of the records that is used; above 1 they repeat."""
    num: int | None
    """Most records that are taken, of this file or of all `shards` together."""
    row: DatasetSpec
    """How the file is read."""
    media: MediaRule
    """The media rule of the file."""
    shards: tuple[Path, ...] = ()
    """The files of the pattern that found this one, if there are several: they count as one file in parts."""

    def reader(self, work: Path | None = None) -> Reader:
        """Open the file.

        Args:
            work: folder for what is unpacked.
        """
        return open_reader(self.path, self.row.read, work)

    def choose(self, offsets: RecordOffsets, seed: int, work: Path | None = None) -> RecordOffsets:
        """The records that `ratio` and `num` take: min(int(total * ratio), num), in file order within each round.

        Which ones is decided by the seed and the file's written path, so that files draw apart and alike everywhere.
        The shards of a pattern share what is taken of them together by their sizes.

        Args:
            offsets: every record of this file.
            seed: of the run.
            work: folder for what is unpacked, should other shards have to be counted.
        """
        total, before, of_all = len(offsets), 0, len(offsets)
        if len(self.shards) > 1 and not (self.num is None and self.ratio.is_integer()):
            counts = [_count(path, self.row.read, work) for path in self.shards]
            before, of_all = sum(counts[: self.shards.index(self.path)]), sum(counts)
        wanted = int(of_all * self.ratio + 1e-9)
        if self.num is not None:
            wanted = min(wanted, self.num)
        if of_all != total:  # this file's part of it; the parts add up
            wanted = wanted * (before + total) // of_all - wanted * before // of_all
        rounds, rest = divmod(wanted, total) if total else (0, 0)
        rng = np.random.default_rng([seed, zlib.crc32(self.written.encode())])
        some = np.sort(rng.permutation(total)[:rest])
        return np.concatenate([*([offsets] * rounds), offsets[some]]) if wanted else offsets[:0]


def load_mix(path: str | Path) -> list[MixFile]:
    """Read a data mix: `dataset: {NAME: {ratio, num, data_paths, source, media_root, ...}}`, see docs/datasets.md.

    Long-VITA's own form is one. An entry whose ratio or num is 0 is unused. Relative paths start in the working
    folder; a path with `*`, `?` or `[` that is no file's name is a pattern.

    Raises:
        ConfigError: unreadable, an unknown key, a form that cannot be detected, or files are missing: all of them.
    """
    path = Path(path)
    entries = [entry for entry in read_entries(path) if entry.used]
    if not entries:
        raise ConfigError(f"{path}: every group has ratio or num 0; nothing is left to read.")
    problems = [f"{entry.name}: {problem}" for entry in entries for problem in entry.problems()]
    if problems:
        raise ConfigError(_many(path, problems))
    files = [file for entry in entries for file in _files_of(entry)]
    names: dict[str, int] = {}
    for number, one in enumerate(files):  # the same file may be listed twice, and is counted twice then
        names[one.name] = names.get(one.name, 0) + 1
        if names[one.name] > 1:
            files[number] = dataclasses.replace(one, name=f"{one.name}#{names[one.name]}")
    return files


def _many(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: dataset.{problems[0]}"
    listed = "".join(f"\n  {problem}" for problem in problems)
    return f"{path}: {len(problems)} things are missing (--lint shows the whole mix):{listed}"


def _files_of(entry: DatasetEntry) -> Iterator[MixFile]:
    found = entry.found()
    named: dict[str, list[str]] = defaultdict(list)
    for _, shards in found:
        for file in shards:
            named[file.name].append(os.path.abspath(file))
    files = sum(map(len, named.values()))
    for written, shards in found:
        for file in shards:
            # shards of several subsets bear the same names; the folders in which they differ tell them apart
            alike = named[file.name]
            top = os.path.commonpath(map(os.path.dirname, alike))
            short = file.name if len(alike) == 1 else os.path.relpath(os.path.abspath(file), top)
            row = entry.fitted(entry.row or _detect(file, entry.where))
            yield MixFile(
                name=f"{entry.name}/{short}" if files > 1 else entry.name,
                written=written if Path(written).name == file.name else f"{written}: {file.name}",
                path=file,
                ratio=entry.ratio,
                num=entry.num,
                row=row,
                media=entry.media(row, file),
                shards=tuple(shards) if len(shards) > 1 else (),
            )


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
    row = find_row(source, str(path)) if source is not None else _detect(path, str(path))
    reader = open_reader(path, row.read)
    store = open_store(MediaRule(root=Path(media_root) if media_root is not None else path.parent))
    for line, record in reader.read(reader.index()):
        try:
            if isinstance(record, DataError):
                raise record
            yield record_to_sample(record, row, store=store, source=path.name, line=line)[0], record
        except DataError as error:
            raise DataError(f"{path}, record {line}: {error}") from None


@lru_cache(maxsize=4096)
def _count(path: Path, kind: str, work: Path | None) -> int:
    return len(open_reader(path, kind, work).index())


def _detect(file: Path, where: str) -> DatasetSpec:
    # broken records at the beginning say nothing about the form
    for record in open_reader(file).head(50):
        if not isinstance(record, DataError):
            return detect_row(record, f"{where}: {file}")
    said = "no record can be read among the first 50. Is the file empty, or of another format?"
    if where == str(file):  # no mix names it
        raise ConfigError(f"{where}: {said}")
    raise ConfigError(f"{where}: {file}: {said} If only they are broken, set `source:`.")
