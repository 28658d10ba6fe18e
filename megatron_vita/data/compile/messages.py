"""Makes messages of rejected records portable: they are part of a set's digest, which paths must not change."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from megatron_vita.data.sources.mix import MixFile

_ADDRESS = re.compile(r"\s?(?:\bat|@) 0x[0-9a-fA-F]+|\[\d\d:\d\d:\d\d\]\s?")
"""Memory addresses and times of day in messages of other libraries."""


def portable(message: str, file: MixFile, work: Path) -> str:
    """A message without this machine's folders, memory addresses and time of day.

    Messages of this package name files below the media root; those of other libraries may hold any path.

    Args:
        message: of a rejected record.
        file: the data file that holds the record.
        work: the folder of unpacked copies.
    """
    for pattern, replacement in _places(file.path, file.media.root, work):
        message = pattern.sub(replacement, message)
    return _ADDRESS.sub("", message)


@lru_cache(maxsize=64)
def _places(file: Path, root: Path | None, work: Path) -> tuple[tuple[re.Pattern[str], str], ...]:
    """(pattern of a folder or file of this machine, replacement), longest first."""
    found: dict[str, tuple[str, str]] = {}
    for folder in (file.parent, root):
        for name in _names(folder) if folder is not None else ():
            found[name] = ("(/|(?![^\\s'\":,;)\\]]))", "")
    for name in _names(file):
        found[name] = (r"(?![^\s'\":,;)\]])", file.name)
    for name in _names(work):
        found[name] = (r"(/[^\s'\":,;)\]]*)?", "an unpacked copy")
    return tuple(
        (re.compile(rf"(?<![\w./-]){re.escape(name)}{end}"), replacement.replace("\\", r"\\"))
        for name, (end, replacement) in sorted(found.items(), key=lambda one: -len(one[0]))
    )


def _names(path: Path) -> set[str]:
    """The spellings of a path, without those too short to be distinguished from text."""
    return {name for name in (str(path), os.path.abspath(path), os.path.realpath(path)) if "/" in name.strip("/.")} | {
        name for name in (os.path.abspath(path), os.path.realpath(path)) if name != "/"
    }
