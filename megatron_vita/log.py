"""Rank-aware logging: rank 0 speaks, any rank may warn and then says who it is."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path


class _RankFilter(logging.Filter):
    """Passes everything on rank 0, and only warnings on the other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.who = "" if self.rank == 0 else f"[rank {self.rank}] "
        return self.rank == 0 or record.levelno >= logging.WARNING


def configure(level: int = logging.INFO, *, rank: int | None = None) -> None:
    """Send the package's log to standard error, once per process.

    Args:
        level: lowest level that is shown.
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
    """Leave an error where torchrun finds it, so that its last lines say what was wrong. Elsewhere nothing happens."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def _quiet_libraries() -> None:
    """Keep what megatron-core and torch say on every run, and a user can do nothing about, out of the way.

    That is: optional packages are absent, names are deprecated, and a staging folder already holds our own files.
    `python -W` shows the warnings again.
    """
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
