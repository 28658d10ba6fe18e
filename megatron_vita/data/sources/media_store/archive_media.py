"""Finds members of archives as media, by path or name; uncompressed members are regions of the archive file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from megatron_vita.data.media.names import natural_key
from megatron_vita.data.rejects import code_of, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.media_store import Archive, build_once, open_archive
from megatron_vita.data.sources.media_store.index import (
    FRAMES,
    NAME,
    PATH,
    STEM,
    Found,
    Table,
    index_archive,
    key_of,
    merge_tables,
)
from megatron_vita.data.sources.media_store.members import DEFLATED, FOLDER, REJECTED, STORED, TAR, Member
from megatron_vita.data.sources.media_store.tars import walk
from megatron_vita.data.sources.media_store.zips import data_offset, inflate, local_name
from megatron_vita.errors import ConfigError, DataError

IN_MEMORY = 64 << 20
"""Bytes up to which a packed member is unpacked into memory; a larger one into the work folder."""
MAX_MEMBER = 64 << 30
"""A packed member that says it is larger is rejected."""
_FRAMES_IN_MEMORY = 256 << 20
_OPEN = 16
"""Archives held open by one store."""
_COMPARED = 256 << 20
"""Members of one name are compared up to this size."""


class ArchiveMedia:
    """The archives of one media rule."""

    def __init__(
        self, root: Path, paths: Sequence[Path], work: Path | None, *, frames: bool, resolve: str, progress: bool
    ) -> None:
        """Unpack and index the archives, unless the work folder has their index.

        Args:
            root: the media root.
            paths: the archives.
            work: where indexes and unpacked archives are kept.
            frames: folders of frames are to be found.
            resolve: see MediaRule.
            progress: show bars.

        Raises:
            ConfigError: an archive lies outside the root, is damaged, or has several volumes.
        """
        self._work, self._resolve, self._frames = work, resolve, frames
        self._archives: list[Archive] = []
        self._names: list[str] = []
        """Of each archive for messages: its path below the root, alike on every machine."""
        self._below: dict[str, set[int]] = {}
        """Folder -> the archives that may have been unpacked in it."""
        tables = []
        top = os.path.realpath(root)
        for number, path in enumerate(paths):
            real = os.path.realpath(path)
            if not real.startswith(top.rstrip(os.sep) + os.sep):
                raise ConfigError(f"{path}: the archive lies outside the media root {root}. Set `media_root`.")
            archive = _opened(path, work, progress)
            self._archives.append(archive)
            self._names.append(os.path.relpath(path, root))
            tables.append(self._table_of(archive))
            folder = os.path.relpath(os.path.realpath(path.parent), top)
            parts = [] if folder == "." else folder.split(os.sep)
            for length in range(len(parts) + 1):
                self._below.setdefault("/".join(parts[:length]), set()).add(number)
        merged = (
            tables[0] if len(tables) == 1 else build_once(work, "tables", tables, lambda to: merge_tables(tables, to))
        )
        self._table = Table(merged)
        self._files: dict[int, FileIO] = {}

    def find(self, path: str) -> MediaFile | None:
        """The member or folder of frames that a path relative to the root means.

        Raises:
            DataError: it is rejected, or several differ.
        """
        parts = path.split("/")
        for domain in (PATH, FRAMES) if self._frames else (PATH,):
            for length in range(len(parts) - 1, -1, -1):
                numbers = self._below.get("/".join(parts[:length]))
                if not numbers:
                    continue
                rest = "/".join(parts[length:])
                rows = [row for row in self._table.find(key_of(domain, rest)) if row.archive in numbers]
                if rows:
                    return self._file(rows, rest) if domain == PATH else self._folder(rows, rest)
        return None

    def find_name(self, name: str) -> MediaFile | None:
        """The one member of a name (`name`), or the one video or folder of frames of an id (`stem`).

        Raises:
            DataError: as `find`.
        """
        rows = self._table.find(key_of(NAME if self._resolve == "name" else STEM, name))
        folders = {(row.first, row.second) for row in rows if row.kind == FOLDER}
        files = [row for row in rows if row.kind != FOLDER]
        if folders or any(row.kind not in REJECTED for row in files):
            files = [row for row in files if row.kind not in REJECTED]
        if len(folders) + bool(files) > 1:
            raise reject("media_ambiguous", f"{name} is in the archives more than once. Give the path in the record.")
        if folders:
            return self._folder(self._table.find(folders.pop()), name)
        return self._file(files, name) if files else None

    def _file(self, rows: list[Found], name: str) -> MediaFile:
        row = self._one(rows, name)
        label = f"{self._names[row.archive]}: {name}"
        try:
            return self._medium(row, label)
        except DataError as error:
            code, message = code_of(error)
            raise reject(code, f"{label}: {message}") from None

    def _medium(self, row: Found, label: str) -> MediaFile:
        archive, size = self._archives[row.archive], row.second
        if row.kind == TAR:
            return MediaFile(path=str(archive.data), offset=row.first, size=size, label=label)
        descriptor = self._descriptor(row.archive)
        if row.kind == STORED:
            offset = data_offset(descriptor, row.first)
            if offset + size > os.fstat(descriptor).st_size:
                raise reject("media_truncated", "it ends early.")
            return MediaFile(path=str(archive.data), offset=offset, size=size, label=label)
        assert row.kind == DEFLATED
        if size > MAX_MEMBER:
            raise reject("media_bomb", f"{size} bytes when unpacked; at most {MAX_MEMBER} are.")
        if size <= IN_MEMORY:
            return MediaFile(data=b"".join(inflate(descriptor, row.first, size, row.crc)), label=label)

        def build(target: Path) -> None:
            with target.open("wb") as out:
                for piece in inflate(descriptor, row.first, size, row.crc):
                    out.write(piece)

        return MediaFile(
            path=str(build_once(self._work, "members", [archive.data], build, str(row.first))), label=label
        )

    def _folder(self, rows: list[Found], name: str) -> MediaFile:
        """Frames in natural order."""
        by_name: dict[str, list[Found]] = {}
        for row in rows:
            frame, real = self._frame(row)
            by_name.setdefault(frame, []).append(real)
        if sum(row.second for row in rows if row.kind == DEFLATED) > _FRAMES_IN_MEMORY:
            raise reject("media_broken", f"{name}: so many packed frames are not held in memory. Unpack the archive.")
        frames = [self._file(by_name[frame], frame) for frame in sorted(by_name, key=natural_key)]
        return MediaFile(label=f"{self._names[rows[0].archive]}: {name}", frames=tuple(frames))

    def _frame(self, row: Found) -> tuple[str, Found]:
        """(name, row with the offset of its data) of a frame, whose row has the offset of its header."""
        if row.kind != TAR:
            return local_name(self._descriptor(row.archive), row.first), row
        archive = self._archives[row.archive]
        with archive.data.open("rb") as stream:
            stream.seek(row.first)
            member = next(walk(archive.data, stream, row.first + 1))
        return member.name, row._replace(first=member.offset)

    def _one(self, rows: list[Found], name: str) -> Found:
        """The row that is not rejected; of several with the same content, the first."""
        good = [row for row in rows if row.kind not in REJECTED]
        if not good:
            code, why = REJECTED[rows[0].kind]
            raise reject(code, f"{self._names[rows[0].archive]}: {name}: {why}.")
        if len(good) > 1 and len({self._identity(row) for row in good}) > 1:
            where = " and ".join(dict.fromkeys(self._names[row.archive] for row in good))
            raise reject("media_ambiguous", f"{name} is more than once in {where}, and not the same. Remove one.")
        return good[0]

    def _identity(self, row: Found) -> tuple[int, bytes]:
        """Key that the same members share: size and digest of the content."""
        if row.second > _COMPARED:
            return row.second, repr(row).encode()
        return row.second, hashlib.sha256(b"".join(self._content(row))).digest()

    def _content(self, row: Found) -> Iterator[bytes]:
        member = Member("", row.kind, row.first, row.first, row.second, 0, row.crc)
        return self._archives[row.archive].content(member, self._descriptor(row.archive))

    def _table_of(self, archive: Archive) -> Path:
        def build(target: Path) -> None:
            index_archive(archive, target, frames=self._frames, resolve=self._resolve)

        detail = f"2 {self._frames} {self._resolve}"
        return build_once(self._work, "tables", [archive.data], build, detail)

    def _descriptor(self, number: int) -> int:
        """The opened archive; few are open at a time."""
        if number not in self._files:
            if len(self._files) >= _OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[number] = self._archives[number].data.open("rb", buffering=0)
        return self._files[number].fileno()


def _opened(path: Path, work: Path | None, progress: bool) -> Archive:
    try:
        return open_archive(path, work, progress=progress)
    except DataError as error:  # the archive is at fault and no record
        raise ConfigError(str(error)) from None
