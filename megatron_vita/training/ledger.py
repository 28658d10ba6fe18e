"""The ledger: one JSON line for each optimizer step, so that any two runs can be compared step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vita.files import write_atomic


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """What one step did."""

    stage: str
    iteration: int
    """1 for the first step of the stage."""
    loss: float | None
    """Mean loss over the labelled tokens of the global batch; none if it had none (then nothing was updated)."""
    grad_norm: float | None
    """Global gradient norm before clipping; none if nothing was updated."""
    lr: float
    num_labels: int
    """Labelled tokens of the global batch."""
    num_tokens: int
    """Tokens of the global batch, padding included."""
    sample_ids: list[int]
    """Samples of the global batch (row numbers in the shards' samples file), over all data-parallel ranks."""
    failed_samples: list[int]
    """Samples whose pictures could not be decoded; their labels were masked on every rank."""
    seconds: float
    """Wall time of the step."""


class Ledger:
    """Appends to `ledger.jsonl` of a stage. Only rank 0 holds one."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Open for appending after step `resume_at`; lines of steps that a killed run took after its checkpoint go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = drop_later_lines(path, resume_at)
        self._file = path.open("a", encoding="utf-8")
        self.failed_samples = frozenset(sample for line in kept for sample in line["failed_samples"])

    def write(self, line: LedgerLine) -> None:
        """Append one step and flush, so that a kill loses at most the step it interrupts."""
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def drop_later_lines(path: Path, last: int) -> list[dict[str, Any]]:
    """Keep a ledger's lines up to iteration `last`, replacing the file at once; returns them. No file: an empty one."""
    kept = [line for line in read_ledger(path) if line["iteration"] <= last] if path.exists() else []
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger, leaving out a last line that a kill cut short."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)
