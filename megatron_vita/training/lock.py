"""One run at a time on a folder: two that trained there would write over each other's ledger and checkpoints."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import lock_process, no_locks, no_room

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
"""In the folder checkpoint.save. It is held from before the first write until the process ends, and says who holds it.
It stays: deleting it would let two runs hold a file of that name."""


class RunLock:
    """Locks on folders, held until the end of a `with` block or of the process, also when that is killed. On rank 0."""

    def __init__(self) -> None:
        self._held: list[IO[str]] = []

    def take(self, folders: Mapping[str, str]) -> None:
        """Lock each folder; it is made if it does not exist. Nothing is written in one that another run holds.

        Args:
            folders: checkpoint.save, and a stage that saves there, for messages.

        Raises:
            ConfigError: another run holds one, or it cannot be written.
            CheckpointError: there is no room.
        """
        distinct = {os.path.realpath(folder): (folder, stage) for folder, stage in folders.items()}
        for path, (folder, stage) in distinct.items():
            where = f"stage {stage!r}: checkpoint.save={folder}"
            try:
                Path(path).mkdir(parents=True, exist_ok=True)
                stream = (Path(path) / LOCK_FILE).open("a+", encoding="utf-8")
                self._held.append(stream)
                self._lock(stream, where)
            except OSError as error:
                kind = CheckpointError if no_room(error) else ConfigError
                raise kind(f"{where}: cannot be written ({error}). Make room, or choose another.") from None

    def _lock(self, stream: IO[str], where: str) -> None:
        try:
            held = lock_process(stream)
        except OSError as error:
            if not no_locks(error):
                raise
            log.warning("%s: no lock there (%s). Make sure that no second run uses this folder.", where, error)
            return
        stream.seek(0)
        if not held:
            raise ConfigError(
                f"{where}: another run is training there ({stream.read(1000).strip() or 'unknown'}). Wait for its end, "
                "stop it, or choose another folder."
            )
        stream.truncate()
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        stream.write(f"host {socket.gethostname()}, process {os.getpid()}, since {started}\n")
        stream.flush()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._held:
            stream.close()
