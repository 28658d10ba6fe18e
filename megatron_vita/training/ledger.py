"""The ledger: a log with one JSON line per optimizer step, by which two runs can be compared step by step.

A checkpoint holds how many bytes of the file belong to its steps, and their digest. A run that goes on from it hashes
these bytes and parses none of them; what follows them belongs to steps that are done again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.files import (
    BLOCK_BYTES,
    XXH3,
    Digest,
    free_name,
    new_digest,
    sync,
    sync_data,
    write_at,
    write_atomic,
)

log = logging.getLogger(__name__)

LEDGER, VALIDATION = "ledger", "validation"
"""Names of a stage's two logs: of the files, without .jsonl, and of their positions in RunState.extra."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """Record of one optimizer step."""

    stage: str
    """Name of the training stage."""
    iteration: int
    """Number of the step within its stage, from 1."""
    loss: float | None
    """Mean loss over the labelled tokens of the global batch; None if it has none (then no weight was updated)."""
    grad_norm: float | None
    """Global gradient norm before clipping; None if no weight was updated."""
    lr: float
    """Learning rate of the step (the vision tower's may differ)."""
    num_labels: int
    """Labelled tokens of the global batch."""
    num_tokens: int
    """Tokens of the global batch, padding included."""
    consumed_packs: int
    """Packs of the stream that are consumed after the step. The step's samples follow from it, the seed and the shards'
    digest: `tools/inspect_data.py --ledger` prints them."""
    failed_samples: list[int]
    """Samples with images that could not be decoded; their labels were masked on every rank."""
    seconds: float
    """Wall time of the step."""


class Ledger:
    """Writer of a file of JSON lines, each with an `iteration`, whose position checkpoints hold. On rank 0 alone."""

    def __init__(self, path: Path, *, resume_at: int, saved: Mapping[str, Any] | None = None) -> None:
        """Open for appending after the lines of step `resume_at`; later ones, of a run that was killed, are removed.

        A file that does not hold what the checkpoint says is set aside, and a new one begun.

        Args:
            path: of the file; made if it does not exist.
            resume_at: step of the checkpoint that the run goes on from; 0 at a stage's start.
            saved: the file's `position` in that checkpoint. A checkpoint of an earlier release has none: then every
                line is read.

        Raises:
            OSError: the file cannot be read or written.
        """
        self.path = path
        self.failed_samples: frozenset[int] = frozenset()
        """Of the lines up to `resume_at`, where a checkpoint has no position: its successors hold these ids too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if saved and saved["bytes"] and not path.exists():
            log.error("%s: is missing. The run goes on with a new file.", path)
            saved = {"bytes": 0}
        path.touch()
        if saved is None and resume_at:
            saved = self._from_lines(resume_at)
        self._bytes = int(saved["bytes"]) if saved else 0
        self._digest, found = _digest_of(path, self._bytes)
        if saved and (problem := _difference(saved, found, self._digest)):
            self._begin_anew(f"{problem} since step {resume_at} was saved")
        self._file = path.open("r+b", buffering=0)
        self._drop_rest(resume_at)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, complete for the operating system. Raises OSError: it could not be written."""
        content = json.dumps(line).encode() + b"\n"
        write_at(self._file.fileno(), content, self._bytes)
        self._bytes += len(content)
        self._digest.update(content)

    def position(self) -> dict[str, Any]:
        """What a checkpoint holds of the file, which is on the disk then: bytes and digest. Raises OSError."""
        try:
            sync_data(self._file.fileno())
        except OSError as error:  # which does not name a file that is open
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return {"bytes": self._bytes, XXH3: self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _from_lines(self, last: int) -> dict[str, Any]:
        """The position after step `last`, and the failed samples before it, from the lines themselves."""
        end, broken, failed = _scan(self.path, last)
        self.failed_samples = frozenset(failed)
        if broken:
            whole = b"".join(text for text, line in _lines(self.path) if line and line["iteration"] <= last)
            self._begin_anew(f"{broken} lines are no lines of a ledger; the others are taken over")
            write_atomic(self.path, whole)
            end = len(whole)
        return {"bytes": end}

    def _begin_anew(self, problem: str) -> None:
        aside = free_name(self.path.with_suffix(f".damaged{self.path.suffix}"))
        os.replace(self.path, aside)
        self.path.touch()
        self._bytes, self._digest = 0, new_digest()
        log.error("%s: %s. It is kept as %s, and the run goes on with a new file.", self.path, problem, aside.name)

    def _drop_rest(self, resume_at: int) -> None:
        """Remove what follows the position, if it is what a killed run leaves there: lines of later steps."""
        steps = [line["iteration"] if line else -1 for _, line in _lines(self.path, self._bytes)]
        if steps != sorted({step for step in steps if step > resume_at or not resume_at}):
            kept = keep_later(self.path, resume_at, {"bytes": self._bytes})
            log.error("%s: not only later steps follow step %d. The rest is kept as %s.", self.path, resume_at, kept)
        elif steps:
            log.info("%s: %d lines after step %d are removed; they are written again", self.path, len(steps), resume_at)
        self._file.truncate(self._bytes)


def keep_later(path: Path, last: int, saved: Mapping[str, Any] | None) -> str | None:
    """Move what follows the lines of step `last` to a file of its own, such as ledger.after_0000050.jsonl.

    Args:
        path: of a ledger; it may be missing.
        last: the step.
        saved: position of the file in the step's checkpoint, if that has one.

    Returns:
        The new file's name, the first that is free; None if nothing follows.

    Raises:
        OSError: a file cannot be read or written.
    """
    if not path.exists():
        return None
    end = int(saved["bytes"]) if saved else _scan(path, last)[0]
    with path.open("r+b") as file:
        file.seek(end)
        later = file.read()
        if not later:
            return None
        aside = free_name(path.with_suffix(f".after_{last:07d}{path.suffix}"))
        write_atomic(aside, later, durable=True)
        file.truncate(end)
    sync(path)
    return aside.name


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a ledger; what is no line of it (the process was killed while writing) is ignored."""
    return (line for _, line in _lines(path) if line)


def _lines(path: Path, start: int = 0) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each complete line from byte `start` on, and its values; None if it is no JSON object with an iteration."""
    with path.open("rb") as file:
        file.seek(start)
        for text in file:
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield text, line if isinstance(line, dict) and type(line.get("iteration")) is int else None


def _scan(path: Path, last: int) -> tuple[int, int, list[int]]:
    """(bytes of the lines up to step `last`, how many of them are broken, failed samples of the others)."""
    end = broken = 0
    failed: list[int] = []
    for text, line in _lines(path):
        if line and line["iteration"] > last:
            break
        end += len(text)
        broken += line is None
        failed += line.get("failed_samples", ()) if line else ()
    return end, broken, failed


def _digest_of(path: Path, count: int) -> tuple[Digest, int]:
    """Digest of a file's first `count` bytes, and how many there are."""
    digest, left = new_digest(), count
    with path.open("rb", buffering=0) as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest, count - left


def _difference(saved: Mapping[str, Any], found: int, digest: Digest) -> str | None:
    """What is wrong with a file whose first `found` bytes have this digest; None: nothing."""
    if found < saved["bytes"]:
        return f"has {found} bytes, fewer than the {saved['bytes']} there were"
    if saved.get(XXH3, digest.hexdigest()) != digest.hexdigest():
        return f"its first {saved['bytes']} bytes have changed"
    return None
