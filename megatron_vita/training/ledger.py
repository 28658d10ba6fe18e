"""The ledger: a log with one JSON line per optimizer step, by which two runs can be compared step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vita.files import write_atomic


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
    sample_ids: list[int]
    """Samples of the global batch (row numbers of the shards' samples file), over all data-parallel ranks."""
    failed_samples: list[int]
    """Samples with images that could not be decoded; their labels were masked on every rank."""
    seconds: float
    """Wall time of the step."""


class Ledger:
    """Writer of a stage's `ledger.jsonl`. Only rank 0 creates one."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Open for appending; removes lines after step `resume_at`, written by a run that was killed later."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = drop_later_lines(path, resume_at)
        self._file = path.open("a", encoding="utf-8")
        self.failed_samples = frozenset(sample for line in kept for sample in line["failed_samples"])

    def write(self, line: LedgerLine) -> None:
        """Append one line and flush it to the operating system."""
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def drop_later_lines(path: Path, last: int) -> list[dict[str, Any]]:
    """Remove the lines after iteration `last`, atomically; creates a missing file.

    Returns:
        the remaining lines.
    """
    kept = [line for line in read_ledger(path) if line["iteration"] <= last] if path.exists() else []
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a ledger; an incomplete last line (the process was killed while writing) is ignored."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)
