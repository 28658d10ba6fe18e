"""Media stores: from a reference in a record to the medium it means, in folders and archives, safely.

A MediaRule says where the media of a data file lie and can be sent to any process; `open_store` makes a store of it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_vita.data.media import safe_path
from megatron_vita.data.names import natural_key
from megatron_vita.data.rejects import refuse
from megatron_vita.data.sample import MediaFile

_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))(\.(aa|0{1,3}|0{0,2}1))?$", re.IGNORECASE)


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


class MediaStore(ABC):
    """Finds media by reference."""

    @abstractmethod
    def find(self, reference: str) -> MediaFile:
        """The medium that a record's reference means.

        Raises:
            DataError: path_escape or media_missing.
        """


class _Nothing(MediaStore):
    def find(self, reference: str) -> MediaFile:
        raise refuse("media_missing", f"{reference} is a path, but no folder is known. Set `media_root` in the mix.")


class _Folder(MediaStore):
    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, reference: str) -> MediaFile:
        return MediaFile(path=str(safe_path(self._root, reference)))


@lru_cache(maxsize=64)
def open_store(rule: MediaRule, work: Path | None = None) -> MediaStore:
    """The store of a rule, one for each process.

    Args:
        rule: where the media lie.
        work: folder for what is kept between runs (indexes of archives, what was unpacked).
    """
    return _Folder(rule.root) if rule.root is not None else _Nothing()


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


def prepare(rule: MediaRule, work: Path, *, progress: bool = True) -> None:
    """Unpack and index the archives of a rule, once, before processes open its store.

    Args:
        rule: where the media lie.
        work: folder for what is kept between runs.
        progress: show bars for long ones.

    Raises:
        ConfigError: an archive cannot be used; the message names it.
    """
    open_store(rule, work)
