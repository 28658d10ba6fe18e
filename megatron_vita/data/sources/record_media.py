"""Collects the media of a record from its fields, under any known name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_vita.data.media.names import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megatron_vita.data.rejects import reject
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.draft import KINDS, Draft, Frames, Kind
from megatron_vita.data.sources.registry import DatasetSpec

_FOUR = ("image", "images", "video", "videos")
_RANKS: dict[Kind, dict[str, int]] = {
    "image": {name: rank for rank, name in enumerate(names.IMAGE_NAMES)},
    "video": {name: rank for rank, name in enumerate(names.VIDEO_NAMES)},
}
_NAMED_TAG = re.compile(r"^<[^<>\s]{1,64}>$")


def is_generic(row: DatasetSpec) -> bool:
    """Whether a row is a generic form, in which media may have any known name, and not a publisher's dataset."""
    return not row.hub and row.map != "text"


def gather(record: dict[str, Any], row: DatasetSpec, draft: Draft) -> tuple[dict[Kind, list[Any]], set[str]]:
    """Collect the references in the fields of a record.

    Args:
        record: what a reader gave.
        row: its fields come first. A publisher's row that declares no field for a kind takes none.
        draft: its `declared` and `tags` are filled.

    Returns:
        (kind -> references, names of fields that were read).

    Raises:
        DataError: undeclared_media; bad_record if several fields hold different media.
    """
    held: dict[Kind, list[Any]] = {}
    read: set[str] = set(draft.ignore)
    for kind in KINDS:
        exact = row.image if kind == "image" else row.video
        if row.read == "wds" or any(key in record for key in exact):
            draft.declared.add(kind)
        found = {key: names.listed(record[key]) for key in exact if key in record and key not in draft.ignore}
        if exact or is_generic(row):
            found |= {key: media for key, media in _other_names(record, kind, read) if key not in found}
        read.update(exact, found)
        held[kind] = _one_of({key: media for key, media in found.items() if media})
    for key, value in record.items():
        if key not in read and names.listed(value) and (key in _FOUR or names.holds_media(names.plain(key), value)):
            raise reject("undeclared_media", f"`{key}` holds media, but source `{row.name}` does not declare it.")
    if is_generic(row) and not any(held.values()):
        _by_suffix(record, held, read)
    media = [one for kind in KINDS for one in held[kind]]
    others = [key for key, value in record.items() if key not in read and isinstance(value, str)] if media else []
    others = [key for key in others if names.is_medium(record[key])]
    stems = {_stem(one) for one in media} if others else set()
    for key in others:  # what a medium is called elsewhere
        unnamed = stems == {""} and names.plain(key) in names.FILE_NAMES
        if unnamed or _stem(record[key]) in stems - {""}:
            read.add(key)
    for kind in KINDS:
        if len(held[kind]) == 1 and isinstance(held[kind][0], dict) and all(map(_NAMED_TAG.match, held[kind][0])):
            tags = held[kind][0]  # MiniCPM: {"<image_00>": path}
            held[kind] = list(tags.values())
            draft.tags.update({tag: (kind, number) for number, tag in enumerate(tags)})
    return held, read


def agreed(some: list[Any], others: list[Any], problem: str) -> list[Any]:
    """Choose between two lists of the same media: embedded before path, path before web address.

    Raises:
        DataError: bad_record with the problem, if they are not the same.
    """
    if len(some) != len(others) or not all(map(_same, some, others)):
        raise reject("bad_record", problem)
    return min(some, others, key=lambda media: max(map(_distance, media)))


def _other_names(record: dict[str, Any], kind: Kind, read: set[str]) -> list[tuple[str, list[Any]]]:
    """(field, its media) for the field's names of a kind that the record has, in the order of the table."""
    keys = {names.plain(str(key)): key for key in record if key not in read}
    found: list[tuple[str, list[Any]]] = []
    known = _RANKS[kind]
    for name in sorted(known.keys() & keys.keys(), key=known.__getitem__):
        if names.holds_media(name, record[keys[name]]):
            found.append((keys[name], names.listed(record[keys[name]])))
    for name in names.FRAMES_NAMES if kind == "video" else ():
        if name in keys and names.holds_media(name, record[keys[name]]):
            found.append((keys[name], [Frames(tuple(names.listed(record[keys[name]])))]))
    numbered: dict[int, str] = {}
    for name, key in keys.items():
        match = names.NUMBERED.match(name)
        if (
            match
            and (match[1] in ("video", "clip")) == (kind == "video")
            and names.find_medium(record[key]) is not None
        ):
            numbered[int(match[2])] = key
    if numbered:
        in_order = [numbered[number] for number in sorted(numbered)]
        found.append((in_order[0], [one for key in in_order for one in names.listed(record[key])]))
        read.update(in_order)
    return found


def _one_of(found: dict[str, list[Any]]) -> list[Any]:
    """The media of a record, of which every field must hold the same."""
    chosen = ""
    media: list[Any] = []
    for key, more in found.items():
        if names.plain(key) in names.VIDEO_NAMES:
            if len(more) > 1 and all(isinstance(one, str) and one.lower().endswith(IMAGE_SUFFIXES) for one in more):
                more = [Frames(tuple(more))]
            more = [Frames(tuple(one)) if isinstance(one, list | tuple) else one for one in more]
        problem = f"`{chosen}` and `{key}` hold different media; which count?"
        if not media:
            chosen, media = key, more
        elif chosen in _FOUR and key in _FOUR and more != media:
            raise reject("bad_record", problem)
        else:
            media = agreed(media, more, problem)
    return media


def _by_suffix(record: dict[str, Any], held: dict[Kind, list[Any]], read: set[str]) -> None:
    """Read the file field of imagefolder and videofolder (`datasets`): the suffix decides its kind."""
    suffixes: dict[Kind, Sequence[str]] = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
    for key, value in record.items():
        media = names.listed(value) if key not in read and names.plain(str(key)) in names.FILE_NAMES else []
        for kind in KINDS:
            if media and all(isinstance(one, str) and one.lower().endswith(tuple(suffixes[kind])) for one in media):
                held[kind] = media
                read.add(key)
                return


def _same(one: Any, other: Any) -> bool:
    """Whether two references may be one medium: embedded and its origin, or paths of one stem."""
    far, near = sorted((_distance(one), _distance(other)), reverse=True)
    return bool(one == other or far != near or (far and _stem(one) == _stem(other)))


def _distance(reference: Any) -> int:
    """0: the medium itself, 1: a path, 2: a web address."""
    return 0 if names.is_embedded(reference) else 2 if names.is_address(reference) else 1


def _stem(reference: Any) -> str:
    """The file name of a reference without its suffix; nothing if it has none."""
    if isinstance(reference, dict):
        reference = reference.get("path") or reference.get("url")
    path = getattr(reference, "label", reference)
    if not isinstance(path, str) or names.is_embedded(path):
        return ""
    return PurePosixPath(path.split("?")[0].lower()).stem
