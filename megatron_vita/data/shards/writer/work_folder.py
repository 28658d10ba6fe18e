"""The folder in which a set is made: held by one run at a time, kept when that is cut short."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.writer.publishing import is_ready, publish, work_folder
from megatron_vita.errors import ConfigError

log = logging.getLogger(__name__)


@contextmanager
def hold_work_folder(prefix: Path, described: str, *, resume: bool) -> Iterator[Manifest | None]:
    """The work folder of a set, for this run alone. Left where it is when the run is cut short.

    Args:
        prefix: folder and name of the set.
        described: of what the folder is made; what an earlier run left of anything else is started over.
        resume: keep what an earlier run of the same has left.

    Returns:
        The set's manifest if nothing was left to do but to publish it.

    Raises:
        ConfigError: nothing can be written there, or another run holds it.
    """
    work = work_folder(prefix)
    note = work / "inputs"
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{work}.lock").open("w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"--output {prefix}: cannot be written ({error}). Choose another.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != os.stat(lock.name).st_ino:
                raise BlockingIOError  # it was another run's, which has just ended
        except (BlockingIOError, FileNotFoundError):
            raise ConfigError(f"--output {prefix}: another run is writing it. Wait, or choose another.") from None
        try:
            left = note.read_text() if note.exists() else None
            if is_ready(work):  # cut short between the old set and the new one
                manifest = publish(work, prefix)
                if left == described and resume:
                    yield manifest
                    return
            if left != described or not work.exists() or not resume:
                if work.exists():
                    log.info("%s is of %s: started over", work, "other inputs" if resume else "an earlier run")
                shutil.rmtree(work, ignore_errors=True)
                for folder in ("active", "sources"):
                    (work / folder).mkdir(parents=True)
                note.write_text(described)
            yield None
        finally:
            Path(lock.name).unlink(missing_ok=True)
