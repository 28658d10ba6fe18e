"""What a folder's weights are, said in a few bytes: so that a killed conversion knows whether it may go on."""

from __future__ import annotations

from pathlib import Path

from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, fingerprint


def identity_of(folder: str | Path) -> list[list[str | int]]:
    """A checkpoint's fingerprint; of any other folder name, size and time of change of every file.

    Reading a downloaded folder whole only to know that it is the same would cost as much as converting it.
    """
    folder = Path(folder).resolve()
    if (folder / INTEGRITY_FILE).is_file():
        return [[INTEGRITY_FILE, fingerprint(folder)]]
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
