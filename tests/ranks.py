"""Run a check in several ranks: forked from the test process (imports are paid once), joined by a file, not a port."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch

import megatron_vita.models.build  # noqa: F401  (with megatron-core, whose import would cost each rank of each world 3 s)
from megatron_vita.parallel.groups import init_distributed

TIMEOUT_S = 120
"""A rank that has not ended by then hangs in a collective: the test fails and says which rank."""


def run_ranks(world_size: int, check: Callable[..., None], *args: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Call `check(*args)` in `world_size` forked processes that already form a world.

    Inside, RANK, WORLD_SIZE and LOCAL_RANK are set and torch.distributed is initialised as in training.

    Raises:
        AssertionError: a rank failed, hung or died; the message names it and carries its traceback.
    """
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, f"{folder}/store", errors, check, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout_s)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
        if not errors.empty():
            rank, text = errors.get()
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{text}")
        assert not hung, f"ranks {hung} of {world_size} hung for {timeout_s} s in {check.__name__}{args}"
        dead = [rank for rank, process in enumerate(ranks) if process.exitcode]
        assert not dead, f"ranks {dead} of {world_size} died in {check.__name__}{args}"


def _rank_main(rank: int, world_size: int, store: str, errors: Any, check: Callable[..., None], args: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        init_distributed(init_method=f"file://{store}", timeout_s=60)
        check(*args)
    except BaseException:
        errors.put((rank, traceback.format_exc()))
        os._exit(1)
    os._exit(0)
