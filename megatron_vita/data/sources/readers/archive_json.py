"""Archives of JSON: a zip or tar whose members are one record each, or files of records."""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sources.media_store import Archive, build_once, open_archive
from megatron_vita.data.sources.media_store.members import REJECTED, Member
from megatron_vita.data.sources.readers.base import Reader, Record, RecordOffsets, as_offsets, parse_record
from megatron_vita.data.sources.readers.json_files import PEEK, array_records, is_turn, json_form, read_range
from megatron_vita.data.sources.readers.scan import BLANK, BYTE_ORDER_MARK, scan_lines
from megatron_vita.errors import DataError

_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (".json", *_LINES)
_TEXT, _INDEX, _UNREAD = "text", "offsets.npy", "unread.json"
_BROKEN = -1
"""Begin of a record whose member cannot be read; its third number is the index in `_UNREAD`."""
_MOST_MEMBER = 16 << 30

log = logging.getLogger(__name__)


class ArchiveJson(Reader):
    """Reads a copy of all members' text in one file, sorted by member name."""

    def __init__(self, path: Path, work: Path | None) -> None:
        super().__init__(path)
        self._work = work

    def prepare(self, *, progress: bool = True) -> None:
        self._copied(progress)

    def index(self) -> RecordOffsets:
        return np.load(self._copied(progress=False) / _INDEX)

    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        copied = self._copied(progress=False)
        unread = json.loads((copied / _UNREAD).read_text(encoding="utf-8"))
        with (copied / _TEXT).open("rb") as stream:
            for number, start, stop in offsets.tolist():
                if start == _BROKEN:
                    name, reason = unread[stop]
                    yield number, reject("bad_record", f"{name}: the member cannot be read: {reason}.")
                else:
                    yield number, read_range(stream, start, stop)

    def _copied(self, progress: bool) -> Path:
        archive = open_archive(self.path, self._work, progress=progress)
        return build_once(self._work, "records", [archive.data], lambda target: _copy(archive, target))


def _copy(archive: Archive, target: Path) -> None:
    members = [member for member in archive.members() if not member.hidden]
    chosen = [member for member in members if member.name.lower().endswith(_SUFFIXES)] or members
    if len(chosen) < len(members):
        log.info(
            "%s: %s no JSON, unused", archive.path, counted(len(members) - len(chosen), "member is", "members are")
        )
    chosen.sort(key=lambda member: member.name)
    found, unread = array("q"), list[tuple[str, str]]()
    if target.exists():  # of a run that was killed
        for one in target.iterdir():
            one.unlink()
    target.mkdir(exist_ok=True)
    descriptor = os.open(archive.data, os.O_RDONLY)
    try:
        with (target / _TEXT).open("w+b", buffering=1 << 20) as out:
            for member in chosen:
                reason = _copy_member(archive, member, descriptor, out, found)
                if reason is not None:
                    found.extend((len(found) // 3 + 1, _BROKEN, len(unread)))
                    unread.append((member.name, reason))
    finally:
        os.close(descriptor)
    (target / _UNREAD).write_text(json.dumps(unread), encoding="utf-8")
    np.save(target / _INDEX, as_offsets(found))


def _copy_member(archive: Archive, member: Member, descriptor: int, out: BinaryIO, found: array[int]) -> str | None:
    """Append a member's text and record offsets; the reason if it cannot be read."""
    begin, number = out.seek(0, 2), len(found) // 3
    if member.kind in REJECTED:
        return REJECTED[member.kind][1]
    if member.size > _MOST_MEMBER:
        return f"it has {member.size} bytes"
    try:
        for piece in archive.content(member, descriptor):
            out.write(piece)
    except DataError as error:
        out.truncate(begin)
        return f"it is damaged ({str(error).rstrip('.')})"
    flat = _records(out, begin, out.tell(), member.name)
    for at in range(0, len(flat), 3):
        number += 1
        found.extend((number, flat[at + 1], flat[at + 2]))
    return None


def _records(stream: BinaryIO, begin: int, end: int, name: str) -> array[int]:
    """The records of one member: of an array, of lines, or the one that is all of it."""
    stream.seek(begin)
    head = stream.read(min(PEEK, end - begin)).removeprefix(BYTE_ORDER_MARK).lstrip(BLANK)
    if json_form(head) == "json":
        return array("q", (1, begin, end)) if is_turn(head) else array_records(stream, begin, end)
    line, _, rest = head.partition(b"\n")
    lines = name.lower().endswith(_LINES) or rest.lstrip(BLANK).startswith((b"{", b"["))
    if not lines and isinstance(parse_record(line), DataError):  # an object over several lines
        return array("q", (1, begin, end)) if head else array("q")
    return scan_lines(stream, begin, end)
