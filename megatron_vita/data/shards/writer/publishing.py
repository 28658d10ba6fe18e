"""From the work folder to the set's own names: the files first, the manifest last, after any kill again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_vita.data.shards.format import SUFFIXES
from megatron_vita.data.shards.manifest import Manifest, load_manifest
from megatron_vita.data.shards.writer.packs import out_path


def work_folder(prefix: Path) -> Path:
    """Where a set is made: beside its place, so that moving it there is instant."""
    return prefix.parent / f".{prefix.name}.work"


def make_ready(work: Path, suffixes: Sequence[str], manifest: Manifest) -> None:
    """Bring a written set to the disk; from here on nothing is left to do but to publish it."""
    partial = work / "manifest.partial"
    partial.write_text(manifest.dumps(), encoding="utf-8")
    for path in (*(out_path(work, suffix) for suffix in suffixes), partial):
        _sync(path)
    partial.replace(_ready(work))


def is_ready(work: Path) -> bool:
    """All of a set is written, but it was not (wholly) published."""
    return _ready(work).exists()


def publish(work: Path, prefix: Path) -> Manifest:
    """Move a finished set to its names, the manifest last; may be done again when it was cut short.

    In between there is no set under the name, rather than one of mixed files.
    """
    manifest = load_manifest(_ready(work).with_suffix(""))
    final = Path(f"{prefix}.json")
    final.unlink(missing_ok=True)
    for suffix in SUFFIXES:
        _place(out_path(work, suffix), Path(f"{prefix}.{suffix}"), suffix in manifest.files)
    shutil.copyfile(_ready(work), work / "manifest.copy")
    _sync(work / "manifest.copy")
    (work / "manifest.copy").replace(final)
    _sync(final.parent)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _place(made: Path, final: Path, wanted: bool) -> None:
    """Move one file to its name, if that is not done already; remove an older set's that has no successor."""
    if not wanted:
        final.unlink(missing_ok=True)
    elif made.exists():
        made.replace(final)


def _ready(work: Path) -> Path:
    return work / "ready.json"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
