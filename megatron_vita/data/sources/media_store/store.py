"""Media stores resolve a record's references to media in folders and archives, never outside the media root.

A MediaRule says where the media of a data file lie and can be sent to any process; `open_store` makes a store of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_vita.data.media.names import locate, natural_key
from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.sources.media_store.archive_media import ArchiveMedia
from megatron_vita.data.sources.media_store.index import FolderIndex, stem_of
from megatron_vita.errors import ConfigError

RESOLVE = ("path", "stem", "name")

_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))(\.(aa|0{2,3}|0{1,2}1))?$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaRule:
    """Where the media of one data file lie."""

    root: Path | None = None
    """Folder that relative references start in; nothing outside it is read. None: every medium must be embedded."""
    archives: tuple[Path, ...] = ()
    """Archives under the root that are looked into where no file is found, as if each were unpacked in its own folder
    or in any folder above it, up to the root. `list_archives` finds them; of a split archive only the first part."""
    resolve: str = "path"
    """What a reference is: `path`; `stem`: or else an id, the one video or folder of frames of that name, whatever its
    folder and suffix; `name`: or else the one file of that name, whatever its folder (archives that are unpacked flat).
    """
    rewrite: tuple[tuple[str, str], ...] = ()
    """(beginning, replacement): the first that a reference begins with is replaced."""
    frames: bool = False
    """References may name folders of frames inside archives, too. (Always so with `stem`.)"""
    frame_rate: float = 1.0
    """Pictures of a folder of frames that make a second."""
    place: str = ""
    """The root as the mix writes it, the same on every machine."""
    shown: str = ""
    """How messages call the root, alike on every machine; media are then called by their path below it. None: both by
    their whole path."""


class MediaStore(ABC):
    """Finds media by reference."""

    @abstractmethod
    def find(self, reference: str) -> MediaFile:
        """Resolve a reference of a record.

        Raises:
            DataError: path_escape, media_missing or media_ambiguous; or why the member of an archive is not read.
        """


class _Nothing(MediaStore):
    def find(self, reference: str) -> MediaFile:
        raise reject("media_missing", f"{reference} is a path, but no folder is known. Set `media_root` in the mix.")


class _Rooted(MediaStore):
    """Looks for a file under the root, then in archives, then by name."""

    def __init__(self, rule: MediaRule, root: Path, work: Path | None, *, anew: bool = False, progress: bool = False):
        if rule.resolve not in RESOLVE:
            raise ConfigError(f"resolve {rule.resolve!r}: choose {', '.join(RESOLVE)}.")
        self._rule, self._given = rule, root
        self._root = os.path.realpath(root)
        self._archives: ArchiveMedia | None = None
        self._names: FolderIndex | None = None
        if rule.archives:
            frames = rule.frames or rule.resolve == "stem"
            self._archives = ArchiveMedia(
                root, rule.archives, work, frames=frames, resolve=rule.resolve, progress=progress
            )
        if rule.resolve != "path":
            self._names = FolderIndex(Path(self._root), rule.resolve, work, anew=anew)

    def find(self, reference: str) -> MediaFile:
        for beginning, replacement in self._rule.rewrite:
            if reference.startswith(beginning):
                reference = replacement + reference.removeprefix(beginning)
                break
        real = locate(self._root, reference)
        inside = os.path.isabs(reference) and os.path.relpath(os.path.realpath(reference), self._root)
        path = os.path.normpath(inside or reference)
        if real is not None:
            return self._on_disk(real, path)
        found = self._archives.find(path) if self._archives else None
        if found is None and self._names is not None:
            found = self._by_name(path)
        if found is not None:
            return dataclasses.replace(found, frame_rate=self._rule.frame_rate)
        count = len(self._rule.archives)
        archives = f" or in its {counted(count, 'archive')}" if count else ""
        raise reject(
            "media_missing",
            f"{path if inside else reference} does not exist under {self._rule.shown or self._given}{archives}. "
            "Set the media root (`media_root`, --media-root), or fetch it.",
        )

    def _on_disk(self, real: str, path: str) -> MediaFile:
        return MediaFile(path=real, label=path if self._rule.shown else None, frame_rate=self._rule.frame_rate)

    def _by_name(self, path: str) -> MediaFile | None:
        assert self._names is not None
        folder, name = os.path.split(path)
        if self._rule.resolve == "stem":
            if folder:  # a path that says more than an id
                return None
            name = stem_of(name)
        on_disk = self._names.find(name)
        if len(on_disk) > 1:
            raise reject("media_ambiguous", f"{name} may be {on_disk[0]} or {on_disk[1]}. Give the path in the record.")
        if on_disk:
            real = locate(self._root, on_disk[0])
            return None if real is None else self._on_disk(real, on_disk[0])
        return self._archives.find_name(name) if self._archives else None


@lru_cache(maxsize=64)
def open_store(rule: MediaRule, work: Path | None = None) -> MediaStore:
    """The store of a rule, one for each process.

    Args:
        rule: where the media lie.
        work: folder for what is kept between runs (indexes of archives, what was unpacked); none: a temporary one.

    Raises:
        ConfigError: an archive cannot be used; the message names it.
    """
    return _Rooted(rule, rule.root, work) if rule.root is not None else _Nothing()


def new_store(rule: MediaRule, work: Path | None = None, *, progress: bool = False) -> MediaStore:
    """A new store of a rule, without the index of an earlier one.

    Args: as `prepare`.

    Raises:
        ConfigError: as `open_store`.
    """
    return _Rooted(rule, rule.root, work, anew=True, progress=progress) if rule.root is not None else _Nothing()


def prepare(rule: MediaRule, work: Path, *, progress: bool = True) -> None:
    """Unpack and index the archives of a rule, and list names on disk, once, before processes open its store.

    Args:
        rule: where the media lie.
        work: folder for what is kept between runs.
        progress: show bars for long ones.

    Raises:
        ConfigError: an archive cannot be used; the message names it.
    """
    new_store(rule, work, progress=progress)


def list_archives(root: Path, patterns: Sequence[str] = ("**/*",)) -> tuple[Path, ...]:
    """Archives under a folder, in natural order, for MediaRule.archives.

    Args:
        root: the media root.
        patterns: which, as globs relative to the root (`*_images_*.tar.gz`).

    Returns:
        zip, tar and packed tar files; of a split archive (`.aa .ab ...`) its first part.
    """
    found = {path for pattern in patterns for path in root.glob(pattern) if _ARCHIVE.search(path.name)}
    return tuple(sorted((path for path in found if path.is_file()), key=lambda path: natural_key(str(path))))
