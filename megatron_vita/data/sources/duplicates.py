"""Finds duplicates in a mix: files of two entries, copies, two forms of a file, subsets of two collections."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

from megatron_vita.data.sources.entries import DatasetEntry

_PROBE = 1 << 20
"""Bytes at either end by which two files of one size are compared."""
_ENDINGS = re.compile(r"(-\d+-of-\d+)?(\.(jsonl?|parquet|ndjson))?(\.(gz|zst|xz|bz2))?$")
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


def find_duplicates(files: list[tuple[DatasetEntry, Path]]) -> tuple[list[str], list[str]]:
    """Find files whose samples would be trained twice.

    Args:
        files: every file of a mix with its dataset entry.

    Returns:
        (what is wrong, what may be).
    """
    wrong: list[str] = []
    notes: list[str] = []
    entries: dict[Path, list[DatasetEntry]] = defaultdict(list)
    for entry, file in files:
        entries[file.resolve()].append(entry)
    for file, listed in entries.items():
        if len(listed) > 1:
            names = ", ".join(entry.name for entry in listed)
            wrong.append(f"{file} appears {len(listed)} times: in {names}.")
    by_name: dict[tuple[tuple[str, ...], str], list[Path]] = defaultdict(list)
    by_folder: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file, (entry, *_) in sorted(entries.items()):
        by_name[file.parts[-3:-1], _ENDINGS.sub("", file.name)].append(file)
        by_size[file.stat().st_size].append(file)
        if entry.row is not None and entry.row.hub:
            by_folder[file.parent, entry.row.hub].append(file)
    for alike in by_name.values():
        forms = {_form(file): str(file) for file in alike}
        if len(forms) > 1:
            notes.append(f"{' and '.join(forms.values())} look like two forms of one file.")
    for (folder, hub), alike in by_folder.items():
        kinds = {file.suffix == ".parquet": file.name for file in alike}
        if len(kinds) > 1:
            wrong.append(f"{folder}: {' and '.join(kinds.values())} hold the same records of {hub}. Keep one.")
    for size, alike in by_size.items():
        for one, other in combinations(alike, 2) if size else ():
            if _ends(one) == _ends(other):
                wrong.append(f"{one} and {other} have one size and the same content at both ends.")
    wrong += _subsets_twice(entries)
    return wrong, notes


def _form(file: Path) -> str:
    """Key of a file's form; the shards of one dataset have the same."""
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
