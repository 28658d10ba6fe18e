"""WebDataset: a tar whose members of one key are a sample (`k.jpg`, `k.json`, `k.txt`), wherever they stand in it.

Format: the webdataset library's. The key is a member's path up to the first dot of its last part, the rest is its
extension, whose case says nothing. Several pictures are `k.0.jpg`, `k.img0.jpg` or `k.0_name.jpg`, in the order of the
json member's `name` list, else of their numbers.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.media_store import Archive, build_once, open_archive
from megatron_vita.data.sources.media_store.members import Member
from megatron_vita.data.sources.media_store.tars import walk
from megatron_vita.data.sources.readers.base import Reader, Record, RecordOffsets
from megatron_vita.data.sources.readers.webdataset_group import Group, split_name
from megatron_vita.errors import ConfigError, DataError

_SKIPPED = re.compile(r"__[^/]*__(?:$|/)")
"""Members that describe the tar; the webdataset library ignores them, too."""


class WebDataset(Reader):
    """Groups of members (second and third number of an offset: rows of the index of grouped members).

    A record is what the json member says, with the pictures and videos of the group as `images` and `videos`; a caption
    without a conversation becomes the answer to them. A member that nothing reads becomes a field `.extension`.
    """

    def __init__(self, path: Path, work: Path | None) -> None:
        super().__init__(path)
        self._work = work

    def prepare(self, *, progress: bool = True) -> None:
        self._grouped(progress)

    def index(self) -> RecordOffsets:
        groups = np.load(self._grouped())[:, 0]
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        stops = np.append(starts[1:], len(groups))
        return np.stack([np.arange(1, len(starts) + 1), starts, stops[: len(starts)]], axis=1).astype(np.int64)

    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        archive, rows = self._archive(), np.load(self._grouped(), mmap_mode="r")
        with archive.data.open("rb") as stream:
            for number, start, stop in offsets.tolist():
                try:
                    members = list(_members_at(archive.data, stream, rows[start:stop, 1].tolist()))
                    yield number, Group(archive, members, stream).record()
                except DataError as error:
                    yield number, error

    def _grouped(self, progress: bool = False) -> Path:
        archive = self._archive(progress)
        return build_once(self._work, "groups", [archive.data], lambda target: _group_members(archive, target))

    def _archive(self, progress: bool = False) -> Archive:
        archive = open_archive(self.path, self._work, progress=progress)
        if archive.zipped:
            raise ConfigError(f"{self.path}: a zip, but WebDataset is a tar. Set another `source:` in the data mix.")
        return archive


def _group_members(archive: Archive, target: Path) -> None:
    """Write int64 `[members, 2]`: number of the group, in order of first appearance, and offset of the header."""
    keys, headers = array("Q"), array("q")
    for member in archive.members():
        if not member.hidden and not _SKIPPED.match(member.name):
            key = split_name(member.name)[0].encode("utf-8", "surrogateescape")
            keys.frombytes(hashlib.blake2b(key, digest_size=16).digest())  # 24 bytes a member, however long its name
            headers.append(member.header)
    offsets = np.array(headers, dtype=np.int64)
    low, high = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
    order = np.lexsort((offsets, high, low))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
    first = offsets[order][new][np.cumsum(new) - 1]  # of each member's group
    order = order[np.lexsort((offsets[order], first))]
    first.sort()
    groups = np.cumsum(np.diff(first, prepend=-1) != 0)
    with target.open("wb") as out:
        np.save(out, np.stack([groups, offsets[order]], axis=1))


def _members_at(path: Path, stream: BinaryIO, headers: list[int]) -> Iterator[Member]:
    """The members whose headers stand at ascending offsets; neighbours are read in one go."""
    at = 0
    while at < len(headers):
        stream.seek(headers[at])
        begun = at
        for member in walk(path, stream, headers[-1] + 1):
            if at == len(headers) or member.header != headers[at]:
                break
            yield member
            at += 1
        if at == begun:
            raise reject("bad_record", f"{path} has changed at byte {headers[at]} since it was indexed.")
