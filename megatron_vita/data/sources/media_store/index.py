"""Indexes of media by hashed name: of an archive's members, of a folder tree's files.

A table is sorted and memory-mapped: millions of names are found in microseconds and shared by processes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_vita.data.media.names import FRAME_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megatron_vita.data.sources.media_store.archive import Archive
from megatron_vita.data.sources.media_store.cache import build_once
from megatron_vita.data.sources.media_store.members import FOLDER, REJECTED

PATH, FRAMES, NAME, STEM = b"p", b"f", b"n", b"s"
"""What is hashed: a member's path; the folder that a frame lies in; the last part of a path; that part without suffix,
of videos and of folders of frames."""

Key = tuple[int, int]
"""128 bits."""
_KEY = struct.Struct("<2Q")
_COLUMNS = 6
_TABLE, _PATHS = "table.npy", "paths"


class Found(NamedTuple):
    """A row of a table."""

    first: int
    """Offset of the data (of a frame's and a zip member's: of its header); half of a folder's key."""
    second: int
    """Bytes; the other half of the key."""
    kind: int
    """See members.py."""
    crc: int
    archive: int
    """Number of the archive in the store."""


def key_of(domain: bytes, name: str) -> Key:
    """The hash of a name; 128 bits of BLAKE2b, so that two names never meet."""
    low, high = _KEY.unpack(hashlib.blake2b(domain + name.encode("utf-8", "surrogatepass"), digest_size=16).digest())
    return low, high


class TableBuilder:
    """Collects rows, 48 bytes each."""

    def __init__(self) -> None:
        self._rows = array("Q")

    def add(self, key: Key, first: int, second: int, kind: int = 0, crc: int = 0) -> None:
        """One row."""
        self._rows.extend((*key, first, second, kind | crc << 8, 0))

    def save(self, target: Path) -> None:
        """Sort by key and write."""
        rows = np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, _COLUMNS) if self._rows else _none()
        _write(target, rows[:, 0], rows[:, 1], [rows[:, column] for column in range(_COLUMNS)])


class Table:
    """A saved table."""

    def __init__(self, path: Path) -> None:
        self._columns = np.load(path, mmap_mode="r")
        self._keys = self._columns[0]

    def __len__(self) -> int:
        return int(self._columns.shape[1])

    def find(self, key: Key) -> list[Found]:
        """All rows of a key."""
        columns, out = self._columns, []
        at = int(np.searchsorted(self._keys, np.uint64(key[0])))
        while at < len(self) and int(self._keys[at]) == key[0]:
            if int(columns[1, at]) == key[1]:
                first, second, info, archive = (int(value) for value in columns[2:, at])
                out.append(Found(first, second, info & 0xFF, info >> 8, archive))
            at += 1
        return out


def index_archive(archive: Archive, target: Path, *, frames: bool, resolve: str) -> None:
    """Write the table of an archive's members.

    Args:
        archive: what to list.
        target: the file to write.
        frames: folders of frames are to be found, too.
        resolve: `path`, `name` or `stem`: what else than paths is to be found.

    Raises:
        ConfigError: the archive is damaged.
    """
    table, folders = TableBuilder(), set()
    for member in archive.members():
        table.add(key_of(PATH, member.name), member.offset, member.size, member.kind, member.crc)
        if member.hidden:
            continue
        folder, _, last = member.name.rpartition("/")
        if resolve == "name":
            table.add(key_of(NAME, last), member.offset, member.size, member.kind, member.crc)
        elif resolve == "stem" and last.lower().endswith(VIDEO_SUFFIXES):
            table.add(key_of(STEM, stem_of(last)), member.offset, member.size, member.kind, member.crc)
        if frames and folder and member.kind not in REJECTED and last.lower().endswith(FRAME_SUFFIXES):
            key = key_of(FRAMES, folder)
            table.add(key, member.header, member.size, member.kind, member.crc)
            if resolve == "stem" and folder not in folders:
                folders.add(folder)
                table.add(key_of(STEM, folder.rpartition("/")[2]), *key, FOLDER)
    table.save(target)


def merge_tables(sources: Sequence[Path], target: Path) -> None:
    """One table of several; a row's archive is its table's number."""
    parts = [np.load(path, mmap_mode="r") for path in sources]
    columns = [np.concatenate([part[column] for part in parts]) for column in range(2)]
    numbers = np.repeat(np.arange(len(parts), dtype=np.uint64), [part.shape[1] for part in parts])
    rest = (np.concatenate([part[column] for part in parts]) for column in range(2, _COLUMNS - 1))
    _write(target, columns[0], columns[1], [*columns, *rest, numbers])


def stem_of(name: str) -> str:
    """A file name without the suffix of a video, if it has one (an id may hold dots)."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in VIDEO_SUFFIXES if lower.endswith(suffix)), name)


class FolderIndex:
    """Paths of the media under a root by the last part of the path. The tree is walked once, for all processes."""

    def __init__(self, root: Path, by: str, work: Path | None, *, anew: bool = False) -> None:
        """Use what was found before, or walk the tree.

        Args:
            root: the folder; links to folders are not followed.
            by: `name`: of pictures and videos; `stem`: of videos (without suffix) and folders of frames.
            work: where the list is kept.
            anew: files may have come or gone: walk the tree again.
        """
        self._domain = NAME if by == "name" else STEM
        kept = build_once(work, "names", [root], lambda target: _list(root, self._domain, target), by, anew=anew)
        self._table = Table(kept / _TABLE)
        self._paths = (kept / _PATHS).open("rb")

    def find(self, name: str) -> list[str]:
        """Paths, relative to the root, of all that bear a name."""
        out = []
        for row in self._table.find(key_of(self._domain, name)):
            out.append(os.fsdecode(os.pread(self._paths.fileno(), row.second, row.first)))
        return sorted(out)


def _list(root: Path, domain: bytes, target: Path) -> None:
    table = TableBuilder()
    target.mkdir(exist_ok=True)
    suffixes = VIDEO_SUFFIXES if domain == STEM else (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    with (target / _PATHS).open("wb") as paths:
        for folder, folders, files in os.walk(root):
            folders[:] = [one for one in folders if not one.startswith(".") and one != "__MACOSX"]
            inside = os.path.relpath(folder, root)
            names = [one for one in files if not one.startswith(".") and one.lower().endswith(suffixes)]
            found = [(stem_of(one) if domain == STEM else one, os.path.join(inside, one)) for one in names]
            if domain == STEM and inside != "." and any(one.lower().endswith(FRAME_SUFFIXES) for one in files):
                found.append((os.path.basename(folder), inside))
            for name, path in found:
                raw = os.fsencode(path)
                table.add(key_of(domain, name), paths.tell(), len(raw))
                paths.write(raw)
    table.save(target / _TABLE)


def _write(
    target: Path,
    low: npt.NDArray[np.uint64],
    high: npt.NDArray[np.uint64],
    columns: Sequence[npt.NDArray[np.uint64]],
) -> None:
    order = np.lexsort((high, low))
    with target.open("wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": "<u8", "fortran_order": False, "shape": (_COLUMNS, len(order))}
        )
        for column in columns:
            out.write(column[order].tobytes())


def _none() -> npt.NDArray[np.uint64]:
    return np.zeros((0, _COLUMNS), dtype=np.uint64)
