"""Estimates corrected by dry runs of a few layers: the same layout and widths, at two small depths.

A dry run says what the formulas of planning/memory.py and planning/flops.py miss, at each depth; the difference is a
constant and a share a layer, and is added at the full depth. Extrapolating the dry runs themselves would not do: the
peak of a step is in another place in a shallow model than in a deep one.

This module starts no dry run: `measure` is given a function that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vita.config import StageConfig
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.planning.flops import rank_flops
from megatron_vita.planning.memory import rank_memory
from megatron_vita.planning.rows import Row

DEPTHS = (2, 4)
"""Decoder layers of every model chunk in the two dry runs."""

_UNEVEN = (
    "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a dry run found on one rank."""

    peak: float
    """Bytes at the peak of a step."""
    flops: float
    """FLOPs of one micro-batch."""
    tiles: int
    """Tiles that this rank encoded in the micro-batch."""
    labelled: int
    """Its labelled tokens."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """A pipeline rank's memory and FLOPs, formulas and dry runs together."""

    pp_rank: int
    memory: float
    """Bytes at the peak."""
    formula: float
    """The same by formulas alone."""
    flops: float
    """FLOPs of one micro-batch."""
    formula_flops: float


Job = tuple[StageConfig, int]
"""A stage's settings, and a rank."""


def shallow(stage: StageConfig, layers: int) -> StageConfig:
    """The stage with `layers` decoder layers in every model chunk, of which it recomputes the same share."""
    parallel, model = stage.parallel, stage.model
    split = pipeline_split(parallel, model.num_layers)
    changes: dict[str, int | str | None] = {}
    if parallel.recompute_num_layers is not None:
        deepest, unit = max(split.layers), parallel.recompute_num_layers
        changes["recompute_num_layers"] = max(1, round(layers * min(unit, deepest) / deepest))
        if parallel.recompute_method == "uniform":
            changes["recompute_num_layers"] = layers if unit >= layers else max(n for n in (1, 2) if n <= unit)
    if split.ranks > 1:  # an uneven split becomes an even one of as many chunks
        changes |= dict.fromkeys(_UNEVEN)
        changes["num_virtual_stages_per_pipeline_rank"] = split.virtual if split.virtual > 1 else None
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(model, num_layers=layers * len(split.layers)),
        parallel=dataclasses.replace(parallel, **changes),  # type: ignore[arg-type]
    )


def first_rank(stage: StageConfig, world_size: int, pp_rank: int) -> int:
    """The first rank of a pipeline rank; megatron-core numbers the pipeline slowest."""
    return pp_rank * world_size // stage.parallel.pipeline_model_parallel_size


def pp_ranks(stage: StageConfig) -> list[int]:
    """One pipeline rank of every kind: first, second, last."""
    pp = stage.parallel.pipeline_model_parallel_size
    return sorted({0, min(1, pp - 1), pp - 1})


def measure(
    stage: StageConfig, world_size: int, row: Row, run: Callable[[Sequence[Job]], Sequence[Measured]]
) -> list[Corrected]:
    """Correct the estimates of every kind of pipeline rank by dry runs.

    Args:
        stage: the merged settings of the training stage; its layout has been checked.
        world_size: number of ranks.
        row: the micro-batch that the dry runs take too.
        run: dry runs, one an element, in order.
    """
    ranks = pp_ranks(stage)
    stages = [shallow(stage, depth) for depth in DEPTHS]
    jobs = [(one, first_rank(stage, world_size, pp_rank)) for pp_rank in ranks for one in stages]
    found = run(jobs)
    out = []
    for number, pp_rank in enumerate(ranks):
        pair = found[2 * number : 2 * number + 2]
        rows = [_row_of(stage, row, one) for one in pair]
        memory, flops = [], []
        for one, measured, its in zip(stages, pair, rows, strict=True):
            memory.append(measured.peak - rank_memory(one, world_size, pp_rank, its).total)
            flops.append(measured.flops - rank_flops(one, pp_rank, its, tiles=measured.tiles))
        split = pipeline_split(stage.parallel, stage.model.num_layers)
        layers = split.on_rank(pp_rank) / split.virtual
        formula = rank_memory(stage, world_size, pp_rank, rows[-1]).total
        formula_flops = rank_flops(stage, pp_rank, rows[-1], tiles=pair[-1].tiles)
        corrected = formula + _at(layers, memory)
        out.append(Corrected(pp_rank, corrected, formula, formula_flops + _at(layers, flops), formula_flops))
    return out


def _at(layers: float, residuals: Sequence[float]) -> float:
    """The straight line through the residuals at DEPTHS."""
    (low, high), (first, second) = DEPTHS, residuals
    return first + (second - first) * (layers - low) / (high - low)


def _row_of(stage: StageConfig, row: Row, measured: Measured) -> Row:
    """The row, with as many labels on every context rank as the dry run's rank had."""
    return dataclasses.replace(row, labelled=measured.labelled * stage.parallel.context_parallel_size)
