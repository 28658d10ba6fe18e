"""Lint checks a data mix on this disk before a run. It reads only the first records of each file.

Wrong is what a run would stop at (paths, media folders and archives that are missing), data files and members without a
record, media that lie elsewhere, and what would train a sample twice.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_vita.data.rejects import counted
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.duplicates import find_duplicates
from megatron_vita.data.sources.entries import DatasetEntry, nearest, read_entries
from megatron_vita.data.sources.media_store import is_archive, open_archive
from megatron_vita.data.sources.media_store.compressed import compression_of, parts_of
from megatron_vita.data.sources.media_store.members import REJECTED
from megatron_vita.data.sources.media_store.store import MediaStore, new_store
from megatron_vita.data.sources.readers import open_reader
from megatron_vita.data.sources.registry import DatasetSpec
from megatron_vita.data.sources.to_sample import record_to_sample
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import readable_size

_FIRST = 8
"""Records at the beginning of a file whose media are looked for."""
_NAMED = 3
"""Of several files or members that are alike wrong, so many are named."""
_NUMBER = re.compile(r"(?<=[_.-])\d{1,6}(?=\.)")
_LETTERS = re.compile(r"(?<=\.)[a-z]{2}$")


@dataclass
class Report:
    """What lint found."""

    wrong: list[str] = field(default_factory=list)
    """Each is enough for exit status 1."""
    notes: list[str] = field(default_factory=list)
    """Worth a look."""
    groups: list[str] = field(default_factory=list)
    """One line for each dataset entry that is used."""

    def __str__(self) -> str:
        lines = [*self.groups, *(f"note: {one}" for one in self.notes), *(f"wrong: {one}" for one in self.wrong)]
        return "\n".join([*lines, f"{len(self.wrong)} things are wrong" if self.wrong else "nothing is wrong"])


def lint(path: str | Path) -> Report:
    """Check a data mix.

    Raises:
        ConfigError: it cannot be read as a mix at all.
    """
    report = Report()
    used = [entry for entry in read_entries(Path(path)) if entry.used]
    if not used:
        report.wrong.append("every group has ratio or num 0; nothing is left to read.")
    files = [(entry, file) for entry in used for _, shards in entry.found() for file in shards]
    report.wrong += _missing(used)
    for entry in used:
        mine = [file for one, file in files if one is entry]
        report.groups.append(_line(entry, mine))
        if entry.row is not None:
            unknown = [file.name for file in mine if not entry.row.published(file)]
            report.notes += [f"{entry.name}: {name} is no name of `{entry.row.name}`'s files." for name in unknown]
    report.wrong += [*_elsewhere(files), *_gaps(files), *_empty(files)]
    wrong, notes = find_duplicates(files)
    report.wrong += wrong
    report.notes += notes
    return report


def _line(entry: DatasetEntry, files: list[Path]) -> str:
    taken = f"ratio {entry.ratio:g}" + (f", at most {entry.num} of each" if entry.num is not None else "")
    source = f"`{entry.row.name}`" if entry.row is not None else "form detected from the records"
    archives: dict[Path, int] = {}
    if entry.row is not None and (entry.media_root is None or entry.media_root.is_dir()):
        for file in files:
            rule = entry.media(entry.row, file)
            archives.update({one: sum(part.stat().st_size for part in _parts(one)) for one in rule.archives})
    where = f", media under {entry.media_root}" if entry.media_root is not None else ""
    packed = f", {counted(len(archives), 'archive')} ({readable_size(sum(archives.values()))})" if archives else ""
    size = readable_size(sum(file.stat().st_size for file in files))
    return f"{entry.name}: {taken}, {source}, {counted(len(files), 'file')} ({size}){where}{packed}"


def _missing(entries: Iterable[DatasetEntry]) -> Iterator[str]:
    """One line for each dataset with all that is missing of it, and where that comes from."""
    datasets: dict[str, list[DatasetEntry]] = defaultdict(list)
    for entry in entries:
        datasets[entry.row.hub if entry.row is not None and entry.row.hub else entry.name].append(entry)
    for listed in datasets.values():
        missing = [text for entry in listed for text in entry.missing()]
        said = [problem for entry in listed for problem in entry.problems(paths=False)]
        how = [words for entry in listed if entry.row is not None for words in _fetch(entry.row)]
        if len(missing) == 1:
            hint = nearest(missing[0])
            said.insert(0, f"{missing[0]}: no such data file." + (f" {hint}" if "Did you" in hint or not how else ""))
        elif missing:
            top = os.path.commonpath([os.path.dirname(text) for text in missing])
            names = _some([os.path.relpath(text, top or ".") for text in missing])
            said.insert(0, f"{len(missing)} files missing below {top or 'the working folder'} ({names})")
        if said:
            parts = [one if one is said[-1] and not how else one.rstrip(".") for one in said] + how
            yield f"{_some([entry.name for entry in listed])}: {'; '.join(dict.fromkeys(parts))}"


def _fetch(row: DatasetSpec) -> Iterator[str]:
    """How to fetch a dataset, by its row in the table."""
    if row.built_by:
        yield f"to be built by: {row.built_by}"
    elif row.hub:
        yield f"get them from {row.hub} on the Hugging Face hub"
    if row.gated:
        yield "gated: accept its terms at its page there first"
    if row.media_from:
        yield f"its media: {row.media_from}"
    elif row.archives:
        yield f"its media: {', '.join(_expanded(row))}"


def _expanded(row: DatasetSpec) -> list[str]:
    """The row's archives; a pattern for a folder is said for every folder."""
    folders = list(dict.fromkeys(row.folders.values())) or [""]
    return list(dict.fromkeys(one.format(folder=folder) for one in row.archives for folder in folders))


def _empty(files: Iterable[tuple[DatasetEntry, Path]]) -> Iterator[str]:
    """Data files that hold no record, and members of archives of records that are empty or are not read."""
    for entry, file in files:
        kind = "auto" if entry.row is None else entry.row.read
        try:
            if not is_archive(file):
                if not open_reader(file, kind).head(1):
                    yield f"{entry.name}: {file} holds no record. Fetch it again, or take it out of the mix."
                continue
            archive = open_archive(file) if _listable(file) else None
            members = [one for one in archive.members() if not one.hidden] if archive is not None else None
        except (ConfigError, DataError) as error:
            yield f"{entry.name}: {error}"
            continue
        if members is None:  # it would have to be unpacked for that
            continue
        if not members:
            yield f"{entry.name}: {file} holds no record. Fetch it again, or take it out of the mix."
        empty = [one.name for one in members if not one.size and one.kind not in REJECTED]
        if empty:
            yield f"{entry.name}: {file}: {_some(empty)} {'is' if len(empty) == 1 else 'are'} empty."
        rejected = [f"{one.name} ({REJECTED[one.kind][1]})" for one in members if one.kind in REJECTED]
        if rejected:
            yield f"{entry.name}: {file}: not read: {_some(rejected)}."


def _listable(file: Path) -> bool:
    """Whether an archive's members can be listed without unpacking it."""
    with file.open("rb") as stream:
        return compression_of(stream.read(64)) is None and len(parts_of(file)) == 1


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class _Probe(MediaStore):
    """A store that records the references it was asked for and whether any was found."""

    def __init__(self, store: MediaStore) -> None:
        self._store = store
        self.asked: list[str] = []
        self.found = False
        self.empty: list[str] = []

    def find(self, reference: str) -> MediaFile:
        self.asked.append(reference)
        file = self._store.find(reference)
        self.found = True
        if file.path is not None and os.path.isfile(file.path) and not os.path.getsize(file.path):
            self.empty.append(reference)
        return file


def _elsewhere(files: Iterable[tuple[DatasetEntry, Path]]) -> Iterator[str]:
    """Report files of whose first records a medium is empty, or none lies in the media folder (archives excluded)."""
    for entry, file in files:
        if entry.row is None or (entry.media_root is not None and not entry.media_root.is_dir()):
            continue
        row, rule = entry.fitted(entry.row), entry.media(entry.row, file)
        if rule.root is None or rule.archives:
            continue
        probe = _Probe(new_store(rule))
        try:
            first = open_reader(file, row.read).head(_FIRST)
        except (ConfigError, DataError):
            continue  # said already
        for line, record in enumerate(first, 1):
            with contextlib.suppress(DataError):
                if not isinstance(record, DataError):
                    record_to_sample(record, row, store=probe, source=entry.name, line=line)
        if probe.empty:
            yield f"{entry.name}: {file.name}: its first records name empty files: {_some(probe.empty)}. Fetch them."
        if probe.asked and not probe.found:
            patterns = ", ".join(_expanded(row) if entry.archives is None else entry.archives)
            packed = f", and no archive {patterns}" if patterns else ""
            by = {"stem": " by their names", "name": " by their names"}.get(rule.resolve, "")
            source = f" Its media: {row.media_from}." if row.media_from else ""
            yield f"{entry.name}: {file.name}: {probe.asked[0]} and so on: none under {rule.root}{by}{packed}.{source}"


def _gaps(files: Iterable[tuple[DatasetEntry, Path]]) -> Iterator[str]:
    """Report gaps in numbered archives and in the parts of split archives."""
    seen: set[Path] = set()
    for entry, file in files:
        if entry.row is not None and (entry.media_root is None or entry.media_root.is_dir()):
            for first in entry.media(entry.row, file).archives:
                seen.update(_parts(first))
                if first.with_suffix(".z01").exists():
                    whole = first.name.replace("_split", "")
                    yield f"{first} is a zip in volumes. Merge them: zip -s 0 {first.name} --out {whole}; remove them."
    series: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(seen):
        letters, number = _LETTERS.search(path.name), _NUMBER.search(path.name)
        if letters:
            place = (ord(letters.group()[0]) - ord("a")) * 26 + ord(letters.group()[1]) - ord("a")
            series[str(path)[:-2]][place] = path
        elif number:
            series[str(path.parent / _NUMBER.sub("#", path.name))][int(number.group())] = path
    for members in series.values():
        for before, after in pairwise(sorted(members)):
            if after != before + 1:
                yield f"{members[before]} is followed by {members[after].name}: what lies between is missing."


def _parts(first: Path) -> list[Path]:
    """All parts of a split archive, else the archive."""
    letters = _LETTERS.search(first.name)
    if not letters:
        return [first]
    stem = first.name[:-2]
    return sorted(one for one in first.parent.iterdir() if one.name.startswith(stem) and _LETTERS.search(one.name))
