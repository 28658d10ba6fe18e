"""Run steps of a recipe at full size on fake CUDA tensors: no GPU, no weights, no data, no torchrun.

    python pretrain_vita.py --config RUN.yaml --dry-run [--world-size 64] [--stage K] [any setting as a flag]

Every kind of rank runs its part of a step, with the program's own code and collectives that are answered at once.
Printed are memory by part, communication, and where the host waits. Exit status 0 if every rank ran and fits, 1 if not,
2 for a usage or configuration error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_vita.config import StageConfig, load_run
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.dryrun.kinds import kinds
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.text import comparison, fits, lines, stage_line
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.files import usable_cores, write_atomic

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML recipe; settings may follow as flags in Megatron's names")
    parser.add_argument(
        "--dry-run", nargs="?", const="fake", choices=("fake", "real"), required=True,
        help="real: on this machine's GPU too, one rank alone with collectives answered; compares",
    )  # fmt: skip
    parser.add_argument("--stage", type=int, help="run this stage alone (1 is the first)")
    parser.add_argument("--world-size", type=int, default=64, help="ranks of the run (default %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, help="this rank alone")
    which.add_argument("--ranks", choices=("all-kinds",), default="all-kinds", help="one rank of every kind")
    parser.add_argument("--steps", type=int, default=2, help="steps to run; the last is reported (default %(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=0,
        help="not a training step: prefill a prompt of so many tokens and decode, in the layout of the stage",
    )  # fmt: skip
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in GiB (default %(default)g)")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="ranks that are tried at once (default: the cores)"
    )
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    arguments, flags = parser.parse_known_args(argv)
    try:
        status = _dry_run(arguments, flags)
        sys.stdout.flush()
    except VitaError as error:
        print(f"pretrain_vita --dry-run: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("pretrain_vita --dry-run: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`: who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _dry_run(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    stages = _stages(arguments, flags)
    jobs = [job for stage in stages for job in _jobs(stage, arguments)]
    reports = _run(jobs, arguments)
    if arguments.json:
        write_atomic(arguments.json, json.dumps([one.to_json() for one in reports], indent=1))
        print(f"wrote {arguments.json}")
    wrong = [f"{one.stage}, rank {one.rank}" for one in reports if not fits(one, arguments.gpu_memory)]
    print(
        f"{len(wrong)} of {len(reports)} ranks fail or do not fit: {'; '.join(wrong)}"
        if wrong
        else f"{len(reports)} ranks of {len(stages)} stages ran and fit"
    )
    return 1 if wrong else 0


def _stages(arguments: argparse.Namespace, flags: Sequence[str]) -> list[StageConfig]:
    """The stages to run, checked as a real run checks them."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("a dry run is one process for all ranks, and torchrun started several. Start it with python.")
    run = load_run(arguments.config, flags, expand=False)
    if min(arguments.world_size, arguments.steps, arguments.workers) < 1 or arguments.prompt_tokens < 0:
        raise ConfigError("--world-size, --steps, --workers and --prompt-tokens must be at least 1.")
    if not arguments.gpu_memory > 0:
        raise ConfigError(f"--gpu-memory {arguments.gpu_memory:g} must be more than 0 GiB.")
    if arguments.json and (arguments.json.is_dir() or not os.access(arguments.json.parent, os.W_OK)):
        raise ConfigError(f"--json {arguments.json} cannot be written. Name a file in a folder that can be.")
    if arguments.stage is not None and not 1 <= arguments.stage <= len(run.stages):
        raise ConfigError(f"--stage {arguments.stage}: the recipe has stages 1 to {len(run.stages)}.")
    if arguments.rank is not None and not 0 <= arguments.rank < arguments.world_size:
        raise ConfigError(f"--rank {arguments.rank}: {arguments.world_size} ranks are 0 to {arguments.world_size - 1}.")
    try:
        run.check(arguments.world_size)
    except ConfigError as error:
        raise ConfigError(f"{error} The ranks are those of --world-size {arguments.world_size}.") from None
    if arguments.dry_run == "real":
        from megatron_vita import device

        if not device.has_accelerator():
            raise ConfigError("--dry-run real needs a GPU, and none is visible. Leave `real` out to run without one.")
    return [run.stages[arguments.stage - 1]] if arguments.stage else list(run.stages)


def _jobs(stage: StageConfig, arguments: argparse.Namespace) -> list[DryRunJob]:
    """The ranks of a stage; of inference those of one replica."""
    world, prompt = arguments.world_size, arguments.prompt_tokens
    if prompt > stage.model.max_position_embeddings:
        raise ConfigError(
            f"--prompt-tokens {prompt} exceeds model.max_position_embeddings={stage.model.max_position_embeddings}."
        )
    if prompt:
        world = stage.parallel.replica_size
    ranks = [arguments.rank % world] if arguments.rank is not None else kinds(stage, world)
    return [
        DryRunJob(stage=stage, world_size=world, rank=rank, steps=arguments.steps, prompt_tokens=prompt)
        for rank in ranks
    ]


def _run(jobs: Sequence[DryRunJob], arguments: argparse.Namespace) -> list[Report]:
    reports: list[Report] = []
    shown: StageConfig | None = None
    with tqdm(total=len(jobs), unit="rank", desc="dry run", disable=None) as bar:
        for job, report in zip(jobs, run_jobs(jobs, workers=arguments.workers), strict=True):
            if job.stage is not shown:
                heading = [stage_line(job), *(f"  {line}" for line in report.kernels)]
                bar.write("\n".join(heading), file=sys.stdout)
                shown = job.stage
            bar.write("\n".join(lines(report, arguments.gpu_memory)), file=sys.stdout)
            bar.update()
            reports.append(report)
    if arguments.dry_run == "real":
        measured = []
        for report, real in zip(reports, run_jobs(jobs, real=True), strict=True):
            print("\n".join([f"{real.stage} on the GPU", *lines(real, arguments.gpu_memory), comparison(report, real)]))
            measured.append(real)
        reports += measured
    return reports
