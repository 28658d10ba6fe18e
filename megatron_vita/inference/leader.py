"""Tools that run on several ranks: rank 0 reads, writes and speaks; the others hear what it found. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from megatron_vita import log
from megatron_vita.errors import VitaError

T = TypeVar("T")


def leads() -> bool:
    """Whether this process is rank 0 of torchrun's world, or alone."""
    return os.environ.get("RANK", "0") == "0"


def from_leader(act: Callable[[], T]) -> T:
    """Do something on rank 0; its result, or its error, on every rank. Collective over torchrun's world.

    Args:
        act: whose result can be pickled.

    Raises:
        VitaError: as `act` does, on every rank; or another rank has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return act()
    from megatron_vita.checkpoint.agree import on_rank_zero
    from megatron_vita.inference.world import together
    from megatron_vita.parallel.groups import init_distributed

    with together():
        init_distributed()
        return on_rank_zero(act)


def fail(tool: str, error: VitaError) -> int:
    """Say on standard error, and to torchrun, why a tool ends; returns its exit status."""
    rank = os.environ.get("RANK")
    sys.stderr.write(f"{tool}{f', rank {rank}' if rank else ''}: {error}\n")
    log.tell_launcher(str(error))
    return error.exit_status
