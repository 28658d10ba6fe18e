"""Cache of files derived from large files: unpacked copies and indexes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from megatron_vita.errors import ConfigError
from megatron_vita.files import lock_file


def build_once(
    work: Path | None,
    kind: str,
    sources: Sequence[Path],
    build: Callable[[Path], None],
    detail: str = "",
    *,
    anew: bool = False,
) -> Path:
    """Build a file or folder derived from other files, or return the cached one.

    It is published atomically when complete, and built by one process while others wait. When the size or time of a
    source changes, it is built anew.

    Args:
        work: the cache folder; None: a temporary one of this process.
        kind: what is made, the name of a folder inside.
        sources: the files it is made of.
        build: makes it under the path it is given.
        detail: what else decides its content.
        anew: make it again, whatever is there.

    Raises:
        ConfigError: the work folder cannot be written, or is full.
    """
    folder = (_temporary() if work is None else work) / kind
    names, states = hashlib.sha256(detail.encode()), hashlib.sha256()
    for source in sources:
        status = source.stat()
        names.update(os.fsencode(os.path.realpath(source)) + b"\0")
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    stem = names.hexdigest()[:24]
    target = folder / f"{stem}-{states.hexdigest()[:16]}"
    if target.exists() and not anew:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / f"{stem}.lock", wait=True):
            if target.exists() and not anew:
                return target
            for stale in folder.glob(f"{stem}-*"):  # of a source that has changed, or partial
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            partial = target.with_name(target.name + ".partial")
            build(partial)
            partial.replace(target)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {sources[0]} cannot be unpacked or indexed there ({error.strerror or error}). Make room there, "
            "or choose another --output."
        ) from None
    return target


@lru_cache(maxsize=1)
def _holder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vita-data-")


def _temporary() -> Path:
    """A folder that lives as long as this process."""
    return Path(_holder().name)
