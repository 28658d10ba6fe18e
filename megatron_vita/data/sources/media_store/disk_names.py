"""Files of a folder tree by name or id: the tree is walked once, and processes share what was found."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vita.data.media.names import FRAME_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megatron_vita.data.sources.media_store import build_once
from megatron_vita.data.sources.media_store.table import NAME, STEM, Table, TableBuilder, key_of, stem_of

_TABLE, _PATHS = "table.npy", "paths"


class DiskNames:
    """Paths of the media under a root, found by the last part of the path."""

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
