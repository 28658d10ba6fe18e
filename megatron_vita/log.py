"""Rank-aware logging: rank 0 speaks, any rank may warn and then says who it is."""

from __future__ import annotations

import logging
import os
import sys


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
