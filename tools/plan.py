"""Estimate memory, FLOPs and time of every stage of a recipe, and search for better layouts. Needs no GPU.

    python tools/plan.py --config RUN.yaml --gpus 64 --hardware H100 [--search] [--stage 2] [any setting as a flag]
    python tools/plan.py --config RUN.yaml --gpus 64 --quick

By default dry runs of a few layers correct the formulas, and one at full depth checks them; that takes minutes and a
C++ compiler. `--quick` takes the formulas alone. Exit status 1 if a stage does not fit into 90 % of the memory, 2 if
the recipe cannot run on that many GPUs, or a dry run is not possible here.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from megatron_vita.config import StageConfig, load_run
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.planning import text
from megatron_vita.planning.hardware import Efficiency, hardware_of
from megatron_vita.planning.measure import Corrected, Job, Measured, first_rank, measure
from megatron_vita.planning.parameters import count_parameters
from megatron_vita.planning.rows import PICTURE_FRACTION, Row, assumed_row
from megatron_vita.planning.search import Request, describe, search

MEASURED = 3
"""Layouts of a search's list that dry runs correct."""


def main() -> int:
    """Print the plan; returns the exit status."""
    arguments, flags = _parser().parse_known_args()
    try:
        hardware = hardware_of(arguments.hardware)
        reached = (arguments.tflops or 0) * 1e12 / hardware.bf16
        efficiency = Efficiency(matrices=reached, attention=reached) if reached else Efficiency()
        memory = (arguments.gpu_memory or hardware.memory_gib) * text.GIB
        run = load_run(arguments.config, flags, expand=False)
        stages = _chosen(run.stages, arguments.stage)
        dataclasses.replace(run, stages=tuple(stages)).check(arguments.gpus)
        counted = count_parameters(stages[0].model)
        print(f"decoder {counted.decoder:,}  tower {counted.tower:,}  projector {counted.projector:,} parameters")
        print(text.assumptions(hardware, efficiency))
        print("GiB of the pipeline rank with the most; computed from the settings, not measured on a GPU")
        print(text.heading())
        totals = []
        for stage in stages:
            row = _row(stage, arguments)
            request = Request(arguments.gpus, memory, hardware, efficiency, row)
            own = request.judge(stage)
            print(text.line(own, request))
            print(f"{'':10} {describe(stage, arguments.gpus)}", flush=True)
            totals.append((stage, own.memory.total if arguments.quick else _measured(stage, arguments)))
            if arguments.search:
                found = search(stage, request)
                print("\n".join(text.suggestions(found, arguments.gpus, own)), flush=True)
                for number, one in enumerate([] if arguments.quick else found.fitting[:MEASURED], 1):
                    worst = _corrected(one.stage, arguments)
                    print(f"  {number:2}. by dry runs of few layers: {worst.memory / text.GIB:.1f} GiB", flush=True)
    except VitaError as error:
        print(f"plan: {error}", file=sys.stderr)
        return error.exit_status
    line, fits = text.verdict(totals, memory)
    print(line)
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML recipe")
    parser.add_argument("--gpus", type=int, required=True, help="world size: ranks that will be launched")
    parser.add_argument("--hardware", default="H100", help="H100, H200, A100-40, A100-80 or H20")
    parser.add_argument("--gpu-memory", type=float, help="memory of one GPU in GiB; by default the hardware's")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one GPU sustains; by default assumed fractions")
    parser.add_argument(
        "--picture-fraction", type=float, default=PICTURE_FRACTION, help="with --quick: fraction of visual tokens"
    )
    parser.add_argument("--stage", type=int, help="number of one stage, from 1; by default all")
    parser.add_argument("--search", action="store_true", help="rank other layouts of the same stage and GPUs")
    parser.add_argument("--quick", action="store_true", help="formulas alone, without dry runs")
    return parser


def _chosen(stages: Sequence[StageConfig], number: int | None) -> Sequence[StageConfig]:
    if number is None:
        return stages
    if not 1 <= number <= len(stages):
        raise ConfigError(f"--stage {number}: the recipe has stages 1 to {len(stages)}.")
    return stages[number - 1 : number]


def _row(stage: StageConfig, arguments: argparse.Namespace) -> Row:
    """A micro-batch of one pack: assumed, or the one that the dry runs take."""
    one_pack = dataclasses.replace(stage, train=dataclasses.replace(stage.train, micro_batch_size=1))
    if arguments.quick:
        return assumed_row(one_pack, picture_fraction=arguments.picture_fraction)
    from megatron_vita.dryrun.rows import rows_of

    found = rows_of(one_pack, stage.parallel.data_parallel_size(arguments.gpus), 1)[0]
    labelled = sum(stop - start for start, stop in found.answers)
    return Row(found.documents, len(found.first_token), labelled)


def _measured(stage: StageConfig, arguments: argparse.Namespace) -> float:
    """Print what dry runs say of a stage's layout; returns the bytes at the peak."""
    worst = _corrected(stage, arguments)
    (full,) = _dry_runs([(stage, first_rank(stage, arguments.gpus, worst.pp_rank))], arguments.gpus)
    print(
        f"{'':10} dry runs of few layers: {worst.memory / text.GIB:.2f} GiB on pipeline rank {worst.pp_rank} (formula "
        f"{worst.formula / text.GIB:.2f}); of all layers: {full.peak / text.GIB:.2f} GiB, "
        f"{full.flops / 1e12:,.1f} TFLOP a micro-batch (formula {worst.formula_flops / 1e12:,.1f})",
        flush=True,
    )
    return full.peak


def _corrected(stage: StageConfig, arguments: argparse.Namespace) -> Corrected:
    """The pipeline rank with the most memory, by dry runs of few layers."""
    one_pack, packs = _row(stage, arguments), stage.train.micro_batch_size
    row = Row(one_pack.documents * packs, one_pack.tiles * packs, one_pack.labelled * packs)
    found = measure(stage, arguments.gpus, row, lambda jobs: _dry_runs(jobs, arguments.gpus))
    return max(found, key=lambda one: one.memory)


def _dry_runs(jobs: Sequence[Job], gpus: int) -> list[Measured]:
    """Run ranks of layouts on fake CUDA tensors.

    Raises:
        ConfigError: a dry run is not possible on this machine.
        VitaError: a layout that a GPU would not run.
    """
    from megatron_vita.dryrun.jobs import DryRunJob, run_jobs

    found = []
    try:
        for report in run_jobs([DryRunJob(stage=stage, world_size=gpus, rank=rank) for stage, rank in jobs]):
            if report.error:
                raise VitaError(f"dry run of rank {report.rank} of {report.stage}: {report.error}")
            found.append(
                Measured(report.peak_bytes, report.flops / report.micro_batches, report.tiles, report.labelled)
            )
    except ConfigError as error:
        raise ConfigError(f"{error} Or plan with --quick, by formulas alone.") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
