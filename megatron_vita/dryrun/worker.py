"""The dry run's own process: `python -m megatron_vita.dryrun.worker SETTINGS`; jobs as JSON on its input.

It loads the C++ part before torch, imports once, and forks a child a job. Every answer is a line of JSON on its output.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from megatron_vita.dryrun import library
from megatron_vita.files import end_with_parent

MEMORY_BYTES = 80 * 1024**3
"""Memory that torch.cuda reports; nothing is decided by it."""


def main(compiled: Path | None, workers: int, *, real: bool) -> None:
    """Answer the jobs on stdin.

    Args:
        compiled: the C++ part; None: not needed.
        workers: children at once.
        real: tensors are real, on this process's device.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which says so
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to the log
    jobs = json.load(sys.stdin)
    library.load(compiled)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_vita.dryrun.collectives import Collectives

    counted = Collectives(real=real)
    counted.install()
    if not real:
        from megatron_vita.dryrun import fake_cuda

        fake_cuda.install(MEMORY_BYTES)
    import torch._dynamo  # noqa: F401  the first step of autograd or an optimizer would

    import megatron_vita.dryrun.generation
    import megatron_vita.dryrun.train_steps  # noqa: F401  imported once, for all children

    running: dict[int, tuple[int, IO[str]]] = {}
    for number, job in enumerate(jobs):
        while len(running) >= workers:
            _collect(running, jobs, answers)
        running.update([_start(number, job, counted, fake=not real)])
    while running:
        _collect(running, jobs, answers)


def _start(number: int, content: dict[str, Any], counted: Any, *, fake: bool) -> tuple[int, tuple[int, IO[str]]]:
    """Fork a child for a job: (its process id, (the job's number, its answer))."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        end_with_parent()
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            json.dump(_answer(content, counted, fake=fake), answer)
        os._exit(0)  # and none of the parent's clean-up
    os.close(writing)
    return child, (number, os.fdopen(reading))


def _answer(content: dict[str, Any], counted: Any, *, fake: bool) -> dict[str, Any]:
    from megatron_vita.dryrun.generation import generate
    from megatron_vita.dryrun.jobs import DryRunJob, failed
    from megatron_vita.dryrun.mode import FakeOperationError
    from megatron_vita.dryrun.train_steps import train
    from megatron_vita.errors import VitaError

    job = DryRunJob.from_json(content)
    try:
        return (generate if job.prompt_tokens else train)(job, counted, fake=fake).to_json()
    except (FakeOperationError, VitaError) as error:
        return failed(job, str(error)).to_json()
    except MemoryError:
        return failed(job, "this machine has too little memory for the dry run itself. Use fewer workers.").to_json()
    except Exception:
        return failed(job, traceback.format_exc()).to_json()


def _collect(running: dict[int, tuple[int, IO[str]]], jobs: list[dict[str, Any]], answers: IO[str]) -> None:
    """Wait for a child and pass its answer on."""
    ready = wait([answer.fileno() for _, answer in running.values()])
    child = next(one for one, (_, answer) in running.items() if answer.fileno() in ready)
    number, answer = running.pop(child)
    with answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        from megatron_vita.dryrun.jobs import DryRunJob, failed

        reason = (
            f"the process of this rank ended with status {code}: this machine may have too little memory. Use fewer "
            "workers."
        )
        report = failed(DryRunJob.from_json(jobs[number]), reason).to_json()
    else:
        report = json.loads(text)
    print(json.dumps({"job": number, "report": report}), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("This is the process behind `pretrain_vita.py --config RUN.yaml --dry-run`, which starts it.")
    settings = json.loads(sys.argv[1])
    main(settings["library"] and Path(settings["library"]), settings["workers"], real=settings["real"])
