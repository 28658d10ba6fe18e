"""What a conversion has finished, so that one that was killed goes on where it was.

A conversion writes into a folder `.writing-NAME` and notes each finished file in `.writing-NAME.journal` beside it, one
JSON object a line; the first line says what is being written, from what. The same command, started again, keeps the
files whose digests still match and writes the others. Another command, source or release starts anew. Just before the
folder gets its name the journal is sealed with the digest of the file that was written last: so whoever finds the
journal of a process that was killed then knows whether the folder under the name is the new one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vita import __version__
from megatron_vita.checkpoint.streams import digest_of
from megatron_vita.errors import CheckpointError, ConfigError, VitaError
from megatron_vita.files import XXH3, lock, no_room, readable_size

Entry = Mapping[str, Any]
"""What a writer wants to know of a finished file; JSON values."""


class Journal:
    """The journal of one staging folder. While it is open no second process can write the same folder."""

    def __init__(self, staging: Path, identity: Mapping[str, Any], final: Path) -> None:
        """Open the journal, or begin one. Everything in the folder that it does not name is deleted.

        Args:
            staging: folder that is written; made if it is not there.
            identity: JSON values that say what is written, from what; another identity starts anew.
            final: the folder's name when it is complete.

        Raises:
            ConfigError: another process is writing the same folder, or nothing can be written there.
            CheckpointError: the disk is full.
        """
        self.staging = staging
        self.path = journal_file(staging)
        self._final = final
        head = json.dumps({**identity, "version": __version__}, sort_keys=True)
        self._made: list[Path] = []
        try:
            self._made = [folder for folder in staging.parents if not folder.exists()]
            staging.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            self._leave_no_parents()
            raise self._unwritable(error) from None
        try:
            self._lock()
            self._finished = self._read(head)
            self.published = bool(self._finished) and not staging.exists() and is_sealed(staging, final)
            """Whether an earlier process has given the folder its name, and was killed before it could say so."""
            if not self.published:
                staging.mkdir(exist_ok=True)
                for path in staging.iterdir():
                    if path.name not in self._finished:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                self._rewrite(head)
        except OSError as error:
            self.__exit__(OSError, error, None)
            raise self._unwritable(error) from None
        except VitaError:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Raises ConfigError if another process has the journal, or has just finished and deleted it."""
        if not lock(self._file):
            raise ConfigError(f"{self._final}: another process is writing it. Wait for it, or choose another.")

    def _unwritable(self, error: OSError) -> VitaError:
        if no_room(error) and error.errno != errno.EROFS:
            return CheckpointError(
                f"{self._final}: cannot be written ({error}). Make room, or choose another --output."
            )
        return ConfigError(f"{self._final}: cannot be written here ({error}). Choose another --output.")

    def _leave_no_parents(self) -> None:
        """Remove the folders above that this process has made, as far as nobody has put anything there."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return

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
                break  # the seal, or the line that was being written when the process was killed
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

    def seal(self, name: str) -> None:
        """Note the file that was written last, and whose content tells this folder from every other: all is there, and
        the folder gets its name next."""
        path = self.staging / name
        self._file.write(json.dumps({"sealed": name, XXH3: digest_of(path, 0, path.stat().st_size)}) + "\n")
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
                self._leave_no_parents()
        with suppress(OSError):  # what a full disk did not take is no longer wanted
            self._file.close()


def journal_file(staging: Path) -> Path:
    """The journal of a staging folder, beside it."""
    return staging.parent / f"{staging.name}.journal"


def is_sealed(staging: Path, final: Path) -> bool:
    """Whether a killed process has left a journal by which the folder `final` is the one that it wrote."""
    try:
        entry = json.loads(journal_file(staging).read_text(encoding="utf-8", errors="replace").splitlines()[-1])
        path = final / entry["sealed"]
        return bool(digest_of(path, 0, path.stat().st_size) == entry[XXH3])
    except (OSError, CheckpointError, ValueError, LookupError, TypeError):
        return False


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
    # bytes that were written need no room again, whether they are kept or deleted
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()) if staging.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise CheckpointError(
            f"{folder}: has {readable_size(free)} free, {readable_size(needed - there)} are needed. Nothing was "
            "written. Make room, or choose another --output."
        )
