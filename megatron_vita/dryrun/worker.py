"""The dry run's own process: `python -m megatron_vita.dryrun.worker LIBRARY WORKERS`; jobs as JSON on its input.

It loads the C++ part before torch, imports once, and forks a child a job. Every answer is a line of JSON on its output.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import IO, Any

from megatron_vita.dryrun import library

MEMORY_BYTES = 80 * 1024**3
"""Memory that torch.cuda reports; nothing is decided by it."""


def main(compiled: Path, workers: int) -> None:
    """Answer the jobs on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to the log
    jobs = json.load(sys.stdin)
    library.load(compiled)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_vita.dryrun import fake_cuda
    from megatron_vita.dryrun.collectives import Collectives

    counted = Collectives(fake_cuda.DEVICE, real=False)
    counted.install()
    fake_cuda.install(MEMORY_BYTES)
    import megatron_vita.dryrun.session  # noqa: F401  imported once, for all children

    running: dict[int, tuple[int, IO[str]]] = {}
    for number, job in enumerate(jobs):
        while len(running) >= workers:
            _collect(running, jobs, answers)
        running.update([_start(number, job, counted)])
    while running:
        _collect(running, jobs, answers)


def _start(number: int, content: dict[str, Any], counted: Any) -> tuple[int, tuple[int, IO[str]]]:
    """Fork a child for a job: (its process id, (the job's number, its answer))."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            json.dump(_answer(content, counted), answer)
        os._exit(0)  # and none of the parent's clean-up
    os.close(writing)
    return child, (number, os.fdopen(reading))


def _answer(content: dict[str, Any], counted: Any) -> dict[str, Any]:
    from megatron_vita.dryrun.jobs import DryRunJob, failed
    from megatron_vita.dryrun.mode import FakeOperationError
    from megatron_vita.dryrun.session import dry_run

    job = DryRunJob.from_json(content)
    try:
        return dry_run(job, counted, fake=True).to_json()
    except FakeOperationError as error:
        return failed(job, str(error)).to_json()
    except MemoryError:
        return failed(job, "this machine has too little memory for the dry run itself. Use fewer workers.").to_json()
    except Exception:
        return failed(job, traceback.format_exc()).to_json()


def _collect(running: dict[int, tuple[int, IO[str]]], jobs: list[dict[str, Any]], answers: IO[str]) -> None:
    """Wait for a child and pass its answer on."""
    import select

    ready, _, _ = select.select([answer for _, answer in running.values()], [], [])
    child = next(one for one, (_, answer) in running.items() if answer in ready)
    number, answer = running.pop(child)
    with answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if not text:
        from megatron_vita.dryrun.jobs import DryRunJob, failed

        code = os.waitstatus_to_exitcode(status)
        reason = f"the process of this rank ended with status {code}: this machine may have too little memory"
        report = failed(DryRunJob.from_json(jobs[number]), reason).to_json()
    else:
        report = json.loads(text)
    print(json.dumps({"job": number, "report": report}), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
