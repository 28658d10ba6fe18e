"""Run cases in ranks forked from this process or started by torchrun."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import device
from megatron_vita.checks.compare import Outcome
from megatron_vita.checks.jobs import RankJob
from megatron_vita.checks.run import run_stage
from megatron_vita.parallel.groups import init_distributed

FORKED_WORLDS = (1, 2, 4)
"""Sizes of the worlds that are forked on one machine."""


@dataclass(frozen=True)
class Result:
    """Result of a job."""

    job: RankJob
    outcome: Outcome | None
    """Differences; none if the job did not finish."""
    error: str | None
    """Why it did not finish: the first rank's traceback, or the stacks of hanging ranks."""
    seconds: float

    @property
    def failures(self) -> list[str]:
        """Failures, the first diverging tensor first; empty for a job that passed."""
        if self.outcome is None:
            return [self.error or "did not end"]
        return self.outcome.failures()


def launched() -> bool:
    """Whether torchrun started this process as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_sizes() -> tuple[int, ...]:
    """How many ranks a case may take: torchrun's world, or up to four forked ones, each on a GPU of its own if there is
    any."""
    if launched():
        return (int(os.environ["WORLD_SIZE"]),)
    most = device.num_accelerators() or max(FORKED_WORLDS)
    return tuple(size for size in FORKED_WORLDS if size <= most)


class Forked:
    """Runs jobs in ranks forked from this process, which live as long as their number fits.

    The caller has imported everything and initialised nothing: a process that was a gloo rank cannot fork ranks.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._pool: _Pool | None = None

    def run(self, job: RankJob) -> Result:
        """Run one job; after a job that did not finish, the next one gets new ranks."""
        if self._pool is not None and self._pool.world_size != job.world_size:
            self.close()
        self._pool = self._pool or _Pool(job.world_size, self._limit_s)
        result = self._pool.run(job)
        if result.outcome is None:
            self.close()
        return result

    def close(self) -> None:
        """Terminate the ranks."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class Launched:
    """Runs jobs in the world that torchrun started, as one of its ranks; every rank gets the results."""

    def __init__(self, limit_s: float) -> None:
        init_distributed(timeout_s=limit_s)  # a collective that hangs raises by then

    def run(self, job: RankJob) -> Result:
        """Run one job. After a job that did not finish the world is broken: run no other."""
        began = time.monotonic()
        try:
            outcome, error = run_stage(job.stage, job.images, job.dtype), None
        except Exception:
            outcome, error = None, f"rank {os.environ['RANK']}: {traceback.format_exc()}"
        return Result(job, outcome, error, time.monotonic() - began)

    def close(self) -> None:
        """Destroy the process groups."""
        if dist.is_initialized():
            dist.destroy_process_group()


class _Pool:
    """Ranks forked from this process, waiting for jobs."""

    def __init__(self, world_size: int, limit_s: float) -> None:
        self.world_size = world_size
        self._limit_s = limit_s
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._ranks: list[Any] = []
        for rank in range(world_size):
            pipe, childs = context.Pipe()
            inherited = [*self._pipes, pipe]
            process = context.Process(target=self._serve, args=(rank, childs, inherited), daemon=True)
            process.start()
            childs.close()
            self._pipes.append(pipe)
            self._ranks.append(process)

    def run(self, job: RankJob) -> Result:
        """Send a job to every rank and wait for all of them."""
        began = time.monotonic()
        outcome, error = self._wait(job, began + self._limit_s)
        return Result(job, outcome if error is None else None, error, time.monotonic() - began)

    def close(self) -> None:
        """Terminate the ranks immediately."""
        for process in self._ranks:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _wait(self, job: RankJob, deadline: float) -> tuple[Outcome | None, str | None]:
        for pipe in self._pipes:
            pipe.send(job)
        outcome = None
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return None, f"hangs: not done after {self._limit_s:g} s\n" + self._stacks(waiting)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                pipe = waiting.pop(rank)
                try:
                    answer = pipe.recv()
                except EOFError:
                    return None, f"rank {rank} died"
                if isinstance(answer, str):
                    return None, f"rank {rank}: {answer}"
                outcome = answer
        return outcome, None

    def _stacks(self, ranks: Iterable[int]) -> str:
        """Stacks of hanging ranks: the innermost calls of each."""
        out = []
        for rank in ranks:
            os.kill(self._ranks[rank].pid, signal.SIGUSR1)
            stack = self._stack_file(rank)
            for _ in range(50):  # the dump is written by the rank's signal handler, within milliseconds
                if stack.stat().st_size:
                    break
                time.sleep(0.02)
            lines = [line.strip() for line in stack.read_text().splitlines() if line.strip().startswith("File")]
            out.append(f"rank {rank} stands at " + " < ".join(lines[:4]))
        return "\n".join(out)

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank{rank}.stack")

    def _serve(self, rank: int, pipe: Connection, inherited: list[Connection]) -> None:
        """Main function of a rank: join the world and run jobs; exit without cleanup after a failure."""
        for other in inherited:  # else a rank would keep its own end open, and not see that the parent is gone
            other.close()
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(rank))
        with self._stack_file(rank).open("w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
            try:
                init_distributed(init_method=f"file://{self._folder.name}/store", timeout_s=2 * self._limit_s)
                while True:
                    job = pipe.recv()
                    pipe.send(run_stage(job.stage, job.images, job.dtype))
            except EOFError:
                pass  # the parent is gone
            except BaseException:
                pipe.send(traceback.format_exc())
            os._exit(0)
