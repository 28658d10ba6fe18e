"""Lint: what is wrong with a data mix on this disk, before any work. Of the records only the first few are read.

Wrong is what a run would stop at (paths, media folders and archives that are missing), media that lie elsewhere, and
what would train a sample twice: a file in two groups, a copy of a file, a file beside its other form, a subset that two
collections hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

from megatron_vita.data.sources.entries import DatasetEntry, read_entries
from megatron_vita.data.sources.media_store.store import open_store
from megatron_vita.data.sources.readers import open_reader
from megatron_vita.errors import DataError
from megatron_vita.files import readable_size

_FIRST = 8
"""Records at the beginning of a file whose media are looked for."""
_PROBE = 1 << 20
"""Bytes at either end by which two files of one size are compared."""
_ENDINGS = re.compile(r"(-\d+-of-\d+)?(\.(jsonl?|parquet|ndjson))?(\.(gz|zst|xz|bz2))?$")
_NUMBER = re.compile(r"(?<=[_.-])\d{1,6}(?=\.)")
_LETTERS = re.compile(r"(?<=\.)[a-z]{2}$")
_CAULDRON, _ONEVISION = "the_cauldron", "LLaVA-OneVision-Data"
_TAKEN_FROM = {
    "allava_instruct_laion4v": "ALLaVA-Instruct-LAION-4V",
    "allava_instruct_vflan4v": "ALLaVA-Instruct-VFLAN-4V",
    "sharegpt4v(coco)": "ShareGPT4V/share",
    "sharegpt4v(knowledge)": "ShareGPT4V/share",
    "sharegpt4v(llava)": "ShareGPT4V/share",
    "sharegpt4v(sam)": "ShareGPT4V/share",
    "CLEVR-Math(MathV360K)": "the_cauldron/clevr_math",
}
"""Subset of LLaVA-OneVision-Data -> what the path of its own publisher's file holds. (Those that both collections
hold under one name are found by that name.)"""


@dataclass
class Report:
    """What lint found."""

    wrong: list[str] = field(default_factory=list)
    """Each is enough for exit status 1."""
    notes: list[str] = field(default_factory=list)
    """Worth a look."""
    groups: list[str] = field(default_factory=list)
    """One line for each group that is used."""

    def __str__(self) -> str:
        lines = [*self.groups, *(f"note: {one}" for one in self.notes), *(f"wrong: {one}" for one in self.wrong)]
        return "\n".join([*lines, f"{len(self.wrong)} things are wrong" if self.wrong else "nothing is wrong"])


def lint(path: str | Path) -> Report:
    """Look a data mix over.

    Raises:
        ConfigError: it cannot be read as a mix at all.
    """
    report = Report()
    used = [group for group in read_entries(Path(path)) if group.used]
    if not used:
        report.wrong.append("every group has ratio or num 0; nothing is left to read.")
    files = [(group, file) for group in used for _, shards in group.found() for file in shards]
    for group in used:
        mine = [file for one, file in files if one is group]
        report.groups.append(_line(group, mine))
        report.wrong += [f"{group.name}: {problem}" for problem in group.problems()]
        if group.row is not None:
            unknown = [file.name for file in mine if not group.row.published(file)]
            report.notes += [f"{group.name}: {name} is no name of `{group.row.name}`'s files." for name in unknown]
    report.wrong += [*_elsewhere(files), *_gaps(files)]
    _twice(files, report)
    return report


def _line(group: DatasetEntry, files: list[Path]) -> str:
    taken = f"ratio {group.ratio:g}" + (f", at most {group.num} of each" if group.num is not None else "")
    source = f"`{group.row.name}`" if group.row is not None else "form told from the records"
    archives: dict[Path, int] = {}
    if group.row is not None and (group.media_root is None or group.media_root.is_dir()):
        for file in files:
            rule = group.media(group.row, file)
            archives.update({one: sum(part.stat().st_size for part in _parts(one)) for one in rule.archives})
    where = f", media under {group.media_root}" if group.media_root is not None else ""
    packed = f", {len(archives)} archives ({readable_size(sum(archives.values()))})" if archives else ""
    size = readable_size(sum(file.stat().st_size for file in files))
    return f"{group.name}: {taken}, {source}, {len(files)} files ({size}){where}{packed}"


def _elsewhere(files: Iterable[tuple[DatasetEntry, Path]]) -> Iterator[str]:
    """Files of whose first records not one has its media in the media folder. (Archives are not opened for it.)"""
    for group, file in files:
        if group.row is None or (group.media_root is not None and not group.media_root.is_dir()):
            continue
        row, rule = group.row, group.media(group.row, file)
        if rule.root is None or rule.archives or rule.resolve == "stem":
            continue
        store, looked_for, found = open_store(rule), [], 0
        for record in open_reader(file, row.read).head(_FIRST):
            fields = record if isinstance(record, dict) else {}
            for value in (fields.get(key) for key in row.image + row.video):
                looked_for += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        for reference in looked_for:
            try:
                store.find(reference)
                found += 1
            except DataError:
                continue
        if looked_for and not found:
            patterns = ", ".join(row.archives if group.archives is None else group.archives)
            packed = f", and no archive {patterns}" if patterns else ""
            yield f"{group.name}: {file.name}: {looked_for[0]} and so on: none under {rule.root}{packed}."


def _gaps(files: Iterable[tuple[DatasetEntry, Path]]) -> Iterator[str]:
    """Numbered archives, and parts of split ones, of which one in the middle is missing."""
    seen: set[Path] = set()
    for group, file in files:
        if group.row is not None and (group.media_root is None or group.media_root.is_dir()):
            for first in group.media(group.row, file).archives:
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


def _twice(files: list[tuple[DatasetEntry, Path]], report: Report) -> None:
    """What would train one sample twice."""
    groups: dict[Path, list[DatasetEntry]] = defaultdict(list)
    for group, file in files:
        groups[file.resolve()].append(group)
    for file, listed in groups.items():
        if len(listed) > 1:
            names = ", ".join(group.name for group in listed)
            report.wrong.append(f"{file} appears {len(listed)} times: in {names}.")
    by_name: dict[tuple[tuple[str, ...], str], list[Path]] = defaultdict(list)
    by_folder: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file, (group, *_) in sorted(groups.items()):
        by_name[file.parts[-3:-1], _ENDINGS.sub("", file.name)].append(file)
        by_size[file.stat().st_size].append(file)
        if group.row is not None and group.row.hub:
            by_folder[file.parent, group.row.hub].append(file)
    for alike in by_name.values():
        forms = {_form(file): str(file) for file in alike}
        if len(forms) > 1:
            report.notes.append(f"{' and '.join(forms.values())} look like two forms of one file.")
    for (folder, hub), alike in by_folder.items():
        kinds = {file.suffix == ".parquet": file.name for file in alike}
        if len(kinds) > 1:
            report.wrong.append(f"{folder}: {' and '.join(kinds.values())} hold the same records of {hub}. Keep one.")
    for size, alike in by_size.items():
        for one, other in combinations(alike, 2) if size else ():
            if _ends(one) == _ends(other):
                report.wrong.append(f"{one} and {other} have one size and the same content at both ends.")
    report.wrong += _subsets_twice(groups)


def _form(file: Path) -> str:
    """What tells two forms of a file apart; the shards of one set are one form."""
    return str(file.parent) + re.sub(r"-\d+-of-", "-of-", _ENDINGS.search(file.name).group())  # type: ignore[union-attr]


def _subsets_twice(files: Iterable[Path]) -> Iterator[str]:
    """the_cauldron's subsets are in LLaVA-OneVision-Data too, as are parts of ALLaVA and ShareGPT4V."""
    paths = sorted(map(str, files))
    cauldron = {_subset(path, _CAULDRON) for path in paths} - {None}
    for name in sorted({_subset(path, _ONEVISION) for path in paths} - {None}, key=str):
        assert name is not None
        bare, bracket, kind = name.partition("(")
        if bare in cauldron and (not bracket or "cauldron" in kind):
            yield f"{_CAULDRON}/{bare} and {_ONEVISION}/{name} are the same pictures and questions. Keep one."
        own = _TAKEN_FROM.get(name)
        for path in paths if own else ():
            if str(own) in path and (own != "the_cauldron/clevr_math" or _subset(path, _CAULDRON) == "clevr_math"):
                yield f"{_ONEVISION}/{name} is in {path} too. Keep one."
                break


def _subset(path: str, collection: str) -> str | None:
    """`x` of `.../collection/x/train-0.parquet` and of `.../collection/x.jsonl`."""
    parts = Path(path).parts
    if collection not in parts[:-1]:
        return None
    after = parts[parts.index(collection) + 1]
    return _ENDINGS.sub("", after)


def _ends(file: Path) -> tuple[bytes, bytes]:
    with file.open("rb") as stream:
        head = stream.read(_PROBE)
        stream.seek(max(0, file.stat().st_size - _PROBE))
        return head, stream.read(_PROBE)


def _parts(first: Path) -> list[Path]:
    """All parts of a split archive, else the archive."""
    letters = _LETTERS.search(first.name)
    if not letters:
        return [first]
    stem = first.name[:-2]
    return sorted(one for one in first.parent.iterdir() if one.name.startswith(stem) and _LETTERS.search(one.name))
