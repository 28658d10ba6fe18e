"""Estimate memory, FLOPs and time of every stage of a recipe, without starting any rank.

    python tools/plan.py --config RUN.yaml --gpus 64 --gpu-memory 80 [--tflops 400] [any setting as a flag]

Exit status 1 if a stage does not fit into 90 % of the memory, 2 if the recipe cannot run on that many GPUs.
"""

from __future__ import annotations

import argparse
import sys

from megatron_vita.config import StageConfig, load_run
from megatron_vita.errors import VitaError
from megatron_vita.planning.flops import step_flops
from megatron_vita.planning.memory import MemoryEstimate, estimate_memory
from megatron_vita.planning.parameters import count_parameters

GIB = 1024**3


def main() -> int:
    """Print the table of stages; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML recipe")
    parser.add_argument("--gpus", type=int, required=True, help="world size: ranks that will be launched")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of one GPU in GiB")
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained TFLOP/s of one GPU in training")
    parser.add_argument("--picture-fraction", type=float, default=0.5, help="fraction of the tokens that are visual")
    arguments, flags = parser.parse_known_args()
    try:
        run = load_run(arguments.config, flags)
        run.check(arguments.gpus)
        rows = [(stage, estimate_memory(stage, arguments.gpus)) for stage in run.stages]
    except VitaError as error:
        print(f"plan: {error}", file=sys.stderr)
        return error.exit_status
    counted = count_parameters(run.stages[0].model)
    print(f"decoder {counted.decoder:,}  tower {counted.tower:,}  projector {counted.projector:,} parameters")
    print("estimates for the rank with the most memory, in GiB; not measured")
    print(
        f"{'stage':10} {'layout':>16} {'weights':>8} {'grads':>7} {'optim':>7} {'activ.':>7} {'head':>6} "
        f"{'total':>7} {'tokens/step':>12} {'PFLOP/step':>11} {'hours':>8}"
    )
    for stage, memory in rows:
        print(_row(stage, memory, arguments))
    too_large = [stage.name for stage, memory in rows if memory.total > 0.9 * arguments.gpu_memory * GIB]
    if too_large:
        names = ", ".join(too_large)
        print(f"over 90% of {arguments.gpu_memory:.0f} GiB: {names}. Raise tp, pp or cp, or recompute more.")
        return 1
    print(f"every stage fits into 90% of {arguments.gpu_memory:.0f} GiB")
    return 0


def _row(stage: StageConfig, memory: MemoryEstimate, arguments: argparse.Namespace) -> str:
    parallel = stage.parallel
    layout = (
        f"tp{parallel.tensor_model_parallel_size} pp{parallel.pipeline_model_parallel_size} "
        f"cp{parallel.context_parallel_size} dp{parallel.data_parallel_size(arguments.gpus)}"
    )
    per_tile = stage.model.vision.tokens_per_tile + 2 if stage.model.vision else 1
    tiles = int(stage.data.seq_length * arguments.picture_fraction / per_tile) if stage.model.vision else 0
    flops = step_flops(stage, tiles_per_pack=tiles, labelled_fraction=1 - arguments.picture_fraction)
    hours = flops * stage.train.train_iters / (arguments.tflops * 1e12 * arguments.gpus) / 3600
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.head, memory.total)
    shown = " ".join(f"{part / GIB:{width}.2f}" for part, width in zip(parts, (8, 7, 7, 7, 6, 7), strict=True))
    tokens = stage.data.seq_length * stage.train.global_batch_size
    return f"{stage.name:10} {layout:>16} {shown} {tokens:12,} {flops / 1e15:11.3f} {hours:8.2f}"


if __name__ == "__main__":
    sys.exit(main())
