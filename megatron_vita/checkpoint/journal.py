"""What a conversion has finished, so that one that was killed goes on where it was.

A conversion writes into a folder `.writing-NAME` and notes each finished file in `.writing-NAME.journal` beside it, one
JSON object a line; the first line says what is being written, from what. The same command, started again, keeps the
files whose digests still match and writes the others. Another command, or another source, starts anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vita.errors import CheckpointError, ConfigError

Entry = Mapping[str, Any]
"""What a writer wants to know of a finished file; JSON values."""


class Journal:
    """The journal of one staging folder. While it is open no second process can write the same folder."""

    def __init__(self, staging: Path, identity: Mapping[str, Any], where: Path) -> None:
        """Open the journal, or begin one. Everything in the folder that it does not name is deleted.

        Args:
            staging: folder that is written; made if it is not there.
            identity: JSON values that say what is written, from what; another identity starts anew.
            where: the final folder, for messages.

        Raises:
            ConfigError: another process is writing the same folder, or nothing can be written there.
        """
        self.staging = staging
        self.path = staging.parent / f"{staging.name}.journal"
        head = json.dumps(dict(identity), sort_keys=True)
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{where}: cannot be written here ({error}). Choose another --output.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{where}: another process is writing it. Wait for it, or choose another.") from None
        self._finished = self._read(head)
        for path in staging.iterdir():
            if path.name not in self._finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._rewrite(head)

    def _read(self, head: str) -> dict[str, Entry]:
        self._file.seek(0)
        lines = self._file.read().splitlines()
        finished: dict[str, Entry] = {}
        if not lines or lines[0] != head:
            return finished
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                finished[str(entry.pop("file"))] = entry
            except (ValueError, KeyError, AttributeError):
                break  # the line that was being written when the process was killed
        return finished

    def _rewrite(self, head: str) -> None:
        """Start over with whole lines, so that the next one does not follow half a line."""
        self._file.truncate(0)
        self._file.write(head + "\n")
        for name, entry in self._finished.items():
            self._file.write(json.dumps({"file": name, **entry}) + "\n")
        self._file.flush()

    def kept(self, name: str, intact: Callable[[Path, Entry], bool]) -> Entry | None:
        """The entry of a file that an earlier run has finished, if `intact` still finds it so."""
        entry, path = self._finished.get(name), self.staging / name
        if entry is None or not path.is_file() or not intact(path, entry):
            return None
        return entry

    def add(self, name: str, entry: Entry) -> None:
        """Note a finished file."""
        self._file.write(json.dumps({"file": name, **entry}) + "\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the journal when the folder has got its name, or when writing failed: then its files go too. What was
        interrupted stays, to be continued."""
        if error is None or isinstance(error, Exception):
            self.path.unlink(missing_ok=True)
            if error is not None:
                shutil.rmtree(self.staging, ignore_errors=True)
        self._file.close()


def check_room(folder: Path, needed: int, staging: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it is to be written, or where that folder will be made.
        needed: bytes in all.
        staging: what an earlier, killed run has written of them.

    Raises:
        CheckpointError: with how much is missing.
    """
    while not folder.exists():
        folder = folder.parent
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()) if staging.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise CheckpointError(
            f"{folder}: has {free / 1e9:.2f} GB free, {(needed - there) / 1e9:.2f} GB are needed. Nothing was written. "
            "Make room, or choose another --output."
        )


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
