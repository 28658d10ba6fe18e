"""Checks of where a conversion may write and what it may replace, before any work is done.

An import writes OUTPUT/iter_0000000. An export writes OUTPUT itself: it is written under another name beside it and
renamed at the end, so OUTPUT can be neither a mount point nor the current directory.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from megatron_vita.checkpoint.folder import replaced_folder, staging_folder, step_folder, steps
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE
from megatron_vita.errors import ConfigError

DIGESTS_FILE = "XXH128SUMS"
"""XXH3 (128 bits) of all files of an exported folder, as `xxh128sum --check` reads them. An export's last file."""
_NAMED = 5
"""Foreign files that an error lists."""


def staging_of(target: Path) -> Path:
    """Where an exported folder is written before it gets its name."""
    return target.parent / f".writing-{target.name}"


def lock_of(target: Path) -> Path:
    """The file that whoever writes an exported folder holds locked. A killed process leaves it behind, unlocked."""
    return target.parent / f".lock-{target.name}"


def check_import(output: Path, sources: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Reject an output that an import may not write. Raises ConfigError: nothing can be written there; it is or lies in
    a source; it holds other steps, or iteration 0 without `overwrite`; with it, something that no import wrote.

    Args:
        output: folder of checkpoints.
        sources: folders that are read; none are skipped.
    """
    target = _resolved(output)
    final = step_folder(target, 0)
    _check_writable(output, target, [target, staging_folder(target, 0)])
    _reject_overlap(output, target, final, sources)
    others = [step.name for step in steps(target) if step != final]
    if others:
        raise ConfigError(
            f"{output}: holds other steps ({others[0]}), and what reads the folder would take the newest of them. "
            "Choose another --output."
        )
    _check_held(final, _listed_by_integrity, overwrite, INTEGRITY_FILE, "import")


def check_export(output: Path, sources: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Reject an output that an export may not write. Raises ConfigError: nothing can be written there, or it cannot be
    renamed; it contains, is or lies in a source; it holds something without `overwrite`; with it, something that no
    export wrote.

    Args:
        output: the Hugging Face folder.
        sources: folders that are read; none are skipped.
    """
    target = _resolved(output)
    _check_writable(output, target, [target, replaced_folder(target), staging_of(target), lock_of(target)])
    if os.path.ismount(target):
        raise ConfigError(f"{output}: is a mount point, which cannot be renamed. Choose a folder in it as --output.")
    if Path.cwd().is_relative_to(target):
        raise ConfigError(f"{output}: is the current directory, or holds it. Choose a folder in it as --output.")
    _reject_overlap(output, target, target, sources)
    _check_held(target, listed_by_digests, overwrite, DIGESTS_FILE, "export")


def _resolved(output: Path) -> Path:
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConfigError(f"{output}: cannot be written ({error}). Choose another --output.") from None


def _check_writable(output: Path, target: Path, names: Iterable[Path]) -> None:
    """Look up each of the names that will be written: one that is too long is found out now, and the next folder above
    must take new entries."""
    for path in names:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{output}: cannot be written ({reason}). Choose another --output.") from None
        if path == target and not is_folder:
            raise ConfigError(f"{output}: is a file. Choose a folder as --output.")
    above = next(folder for folder in target.parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{output}: nothing can be written in {above}. Choose another --output.")


def _reject_overlap(output: Path, target: Path, final: Path, sources: Iterable[str | Path | None]) -> None:
    """`target` is what the user named, `final` what appears there, or replaces what is there."""
    for source in sources:
        if source is None:
            continue
        place = Path(source).resolve()
        if place.is_relative_to(final):
            raise ConfigError(f"{output}: holds {source}, which is read. Choose another --output.")
        if target.is_relative_to(place):
            raise ConfigError(f"{output}: is or lies in {source}, which is read. Choose another --output.")


def _check_held(
    final: Path, listed: Callable[[Path], Collection[str]], overwrite: bool, mark: str, command: str
) -> None:
    """Reject what would be replaced, the folder itself or what a killed process has moved away to replace it, without
    `overwrite`; with it, what holds files that the command has not `listed` in `mark`."""
    there = [one for one in (final, replaced_folder(final)) if one.is_dir() and any(one.iterdir())]
    if not there:
        return
    folder = there[0]
    if not overwrite:
        moved = "" if folder == final else f" (moved away from {final.name} by a process that was killed)"
        raise ConfigError(
            f"{folder}: exists and is not empty{moved}. Choose another --output, or replace it with --overwrite."
        )
    written = set(listed(folder))
    if not written:
        raise ConfigError(
            f"{folder}: no {command} wrote it (no valid {mark}), so --overwrite will not delete it. Choose another."
        )
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    foreign = sorted({path.relative_to(folder).as_posix() for path in files} - written - {mark})
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise ConfigError(
            f"{folder}: holds {', '.join(foreign[:_NAMED])}{more}, which no {command} wrote, so --overwrite will not "
            "delete it. Move that away, or choose another --output."
        )


def _listed_by_integrity(folder: Path) -> set[str]:
    """Files of a checkpoint, damaged ones too; nothing if it is none."""
    try:
        return set(json.loads((folder / INTEGRITY_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def listed_by_digests(folder: Path) -> dict[str, str]:
    """Digests of the files of an exported folder, by name; empty if it is none, or the list is damaged."""
    try:
        lines = (folder / DIGESTS_FILE).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return {}
    outside = any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed)
    return {} if outside else listed
