"""Parity check of parallel layouts: one optimizer step each, compared with a one-process reference in plain PyTorch.

    python tools/check_parallel.py [--grid {small,full,"tp=2 cp=2 comm=p2p"}] [--dtype float64,float32] [--list]
    python tools/check_parallel.py --config RUN.yaml --stage 2
    torchrun --nproc-per-node 8 tools/check_parallel.py --grid "full tp=8"

Prints one line per case: the difference of the loss, the largest difference of a gradient with the tensor's name, and
the difference of the weights after the step. Exit status 1 if a difference exceeds its bound; then the first tensor
that diverges is named. docs/check_parallel.md describes the comparison.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() then does not prevent forking

from megatron_vita import log
from megatron_vita.config import load_run
from megatron_vita.errors import ConfigError, VitaError


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out.add_argument("--grid", default="full", metavar="SPEC", help="small, full, and/or OPTION=VALUE[,VALUE] ...")
    out.add_argument("--dtype", metavar="D[,D]", help="float64, float32, bf16; by default all of them")
    out.add_argument("--list", action="store_true", help="print the cases and the excluded pairs; run nothing")
    out.add_argument("--limit", type=float, default=60.0, metavar="S", help="timeout of one case in seconds")
    out.add_argument("--config", metavar="RUN.yaml", help="check the layout of a recipe's stage instead of a grid")
    out.add_argument("--stage", type=int, default=1, metavar="K", help="the stage, with --config (1 is the first)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print the table; returns the exit status."""
    arguments = parser().parse_args(argv)
    log.configure()
    signal.signal(signal.SIGTERM, _stop)  # so that `finally` terminates the ranks
    try:
        return _check(arguments)
    except VitaError as error:
        print(f"check_parallel: {error}", file=sys.stderr)
        log.tell_launcher(str(error))
        return error.exit_status


def _check(arguments: argparse.Namespace) -> int:
    from megatron_vita import kernels
    from megatron_vita.checks import (
        grid,
        jobs,
        kernels_report,
        ranks,
        report,
    )  # imports torch: only once the command line is sound

    worlds = ranks.world_sizes()
    excluded: dict[str, list[str]] = {}
    if arguments.config:
        stages = load_run(arguments.config).stages
        if not 1 <= arguments.stage <= len(stages):
            raise ConfigError(f"--stage {arguments.stage}: {arguments.config} has stages 1 to {len(stages)}.")
        stage = stages[arguments.stage - 1]
        world = worlds[0] if ranks.launched() else jobs.recipe_world(stage)
        todo = list(jobs.recipe_jobs(stage, world, arguments.dtype))
    else:
        spec = grid.parse_spec(arguments.grid, worlds, arguments.dtype)
        todo = [jobs.case_job(case) for case in grid.make_cases(spec, worlds)]
        excluded = grid.excluded(spec, worlds)
    if arguments.list:
        print(*report.listing(todo, excluded), sep="\n")
        return 0
    say = print if os.environ.get("RANK", "0") == "0" else _silent
    width = max(len(job.name) for job in todo)
    say(report.heading(width))
    runner = ranks.Launched(arguments.limit) if ranks.launched() else ranks.Forked(arguments.limit)
    results: list[ranks.Result] = []
    began = time.monotonic()
    try:
        for job in todo:
            say(report.before(job, width), end="", flush=True)
            results.append(runner.run(job))
            say(report.after(results[-1]), flush=True)
            if ranks.launched() and results[-1].outcome is None:
                break
    finally:
        runner.close()
    dtype = min((job.dtype for job in todo), key=lambda one: one.itemsize)
    say("kernels of this machine:", *kernels.kernel_table(todo[0].stage, dtype), sep="\n  ")  # may start CUDA here
    fused = list(kernels_report.check_kernels()) if say is print else []
    say("fused kernels against the reference implementation:", *fused, sep="\n  ")
    say(*report.summary(results, len(todo), time.monotonic() - began, excluded, fused), sep="\n")
    green = len(results) == len(todo) and not any(result.failures for result in results)
    return 0 if green and not any(kernel.broken for kernel in fused) else 1


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _silent(*_: object, **__: object) -> None:
    """`print` of ranks other than 0."""


if __name__ == "__main__":
    sys.exit(main())
