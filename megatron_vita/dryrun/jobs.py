"""Dry runs from outside: jobs in, reports out. They run in a process of their own, whose torch has fake CUDA.

That process imports torch and megatron-core once and forks a child for every job, so that a run of many small jobs does
not import for each, and a job that fails or exhausts the memory takes no other with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.config import StageConfig, to_dict
from megatron_vita.config.load import stage_from_dict
from megatron_vita.dryrun import library
from megatron_vita.dryrun.report import Report
from megatron_vita.errors import VitaError
from megatron_vita.files import usable_cores


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunJob:
    """One rank of one stage."""

    stage: StageConfig
    world_size: int
    rank: int = 0
    steps: int = 2
    """The last one is reported; the first one allocates the optimizer's state."""
    prompt_tokens: int = 0
    """Not training, but inference: tokens of the prompt that is prefilled."""

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return {**{one.name: getattr(self, one.name) for one in dataclasses.fields(self)}, "stage": to_dict(self.stage)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DryRunJob:
        """The inverse of `to_json`; ConfigError for settings that do not validate."""
        return cls(**{**content, "stage": stage_from_dict(content["stage"], "dry run")})


def run_jobs(jobs: Sequence[DryRunJob], *, workers: int | None = None, real: bool = False) -> Iterator[Report]:
    """Run jobs and yield a report each, in the order of the jobs.

    Args:
        jobs: layouts that have passed `StageConfig.check_layout`.
        workers: jobs that run at once; by default the cores of this machine.
        real: on this machine's GPU with real tensors, one job after the other; reports then have `measured`.

    Raises:
        ConfigError: a dry run is not possible on this machine; says why and what to do.
        VitaError: the process ended before it had answered.
    """
    compiled = None if real else library.build()
    at_once = 1 if real else workers or usable_cores()
    settings = json.dumps({"library": compiled and str(compiled), "workers": at_once, "real": real})
    command = [sys.executable, "-m", "megatron_vita.dryrun.worker", settings]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DISTRIBUTED_DEBUG", None)  # DETAIL asks process groups for what fake ones do not have
    waiting: dict[int, Report] = {}
    following = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its answers end too
                process.stdin.write(json.dumps([job.to_json() for job in jobs]))
                process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                waiting[answer["job"]] = Report.from_json(answer["report"])
                while following in waiting:
                    yield waiting.pop(following)
                    following += 1
            process.wait()
        finally:
            process.kill()
    if following < len(jobs):
        raise VitaError(
            f"the dry run's process ended with status {process.returncode} after {following} of {len(jobs)} ranks; its "
            "messages are above. If it was killed (-9), this machine may have too little memory: use fewer workers."
        )


def failed(job: DryRunJob, error: str) -> Report:
    """The report of a job that a GPU would not have run."""
    return dataclasses.replace(Report(stage=job.stage.name, world_size=job.world_size, rank=job.rank), error=error)
