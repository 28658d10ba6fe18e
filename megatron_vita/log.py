"""Rank-aware logging: everything on rank 0; warnings and errors, prefixed with the rank, on the others."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path


class _RankFilter(logging.Filter):
    """Passes all records on rank 0, warnings and above on the other ranks; adds the rank prefix `who`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.who = "" if self.rank == 0 else f"[rank {self.rank}] "
        return self.rank == 0 or record.levelno >= logging.WARNING


def configure(level: int = logging.INFO, *, rank: int | None = None) -> None:
    """Send the package's log to standard error. Entry points call it once per process.

    Args:
        level: lowest level on rank 0.
        rank: this process's global rank; by default torchrun's `RANK`, or 0 outside torchrun.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(who)s%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_RankFilter(rank))
    logger = logging.getLogger("megatron_vita")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    _quiet_libraries()


def tell_launcher(message: str) -> None:
    """Write an error message to TORCHELASTIC_ERROR_FILE, which torchrun reports; nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def _quiet_libraries() -> None:
    """Hide messages of megatron-core and torch that appear in every run and that a user cannot act on.

    They concern absent optional packages and deprecated names. `python -W` shows the warnings again.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
