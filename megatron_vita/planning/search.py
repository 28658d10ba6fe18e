"""Search for parallel layouts of a stage: which fit into the memory, and how fast each would be.

Layouts that the config itself refuses (StageConfig.check_layout) are not considered. For every layout without
recomputation settings the least recomputation that fits is taken, which is also the fastest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import StageConfig
from megatron_vita.config.parallel import CP_COMM_TYPES, ParallelConfig
from megatron_vita.config.pipeline import nearly_even, pipeline_split
from megatron_vita.errors import ConfigError
from megatron_vita.planning.hardware import USABLE, Efficiency, Hardware
from megatron_vita.planning.memory import MemoryEstimate, estimate_memory
from megatron_vita.planning.rows import Row, assumed_row
from megatron_vita.planning.timing import StepTime, step_time

_MICRO_BATCHES = (1, 2, 4)
_VIRTUAL = (1, 2, 4)
_NEAREST = 3
"""Layouts that do not fit and are listed."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its estimates."""

    stage: StageConfig
    memory: MemoryEstimate
    time: StepTime
    over: float
    """Bytes above what may be filled; 0 or less: it fits."""
    remedy: str = ""
    """What would make a layout fit that does not."""

    @property
    def fits(self) -> bool:
        """It fits into the usable memory."""
        return self.over <= 0


@dataclass(frozen=True, slots=True)
class Request:
    """What is searched for."""

    gpus: int
    memory: float
    """Bytes of one GPU."""
    hardware: Hardware
    efficiency: Efficiency = Efficiency()
    row: Row | None = None
    """A micro-batch of one pack; by default `assumed_row`."""

    def judge(self, stage: StageConfig) -> Candidate:
        """Estimates of one layout.

        Raises:
            ConfigError: the GPUs are not a multiple of the replica size, or the layers do not fit the pipeline.
        """
        row = self.row_of(stage)
        memory = estimate_memory(stage, self.gpus, row)
        time = step_time(stage, self.gpus, self.hardware, row, self.efficiency)
        return Candidate(stage, memory, time, memory.total - USABLE * self.memory)

    def row_of(self, stage: StageConfig) -> Row:
        """The stage's micro-batch."""
        if self.row is None:
            return assumed_row(stage)
        packs = stage.train.micro_batch_size
        return Row(self.row.documents * packs, self.row.tiles * packs, self.row.labelled * packs)


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a search."""

    fitting: list[Candidate]
    """Fastest first."""
    nearest: list[Candidate]
    """Layouts that do not fit but would be the fastest; if none fits, those that miss by the least."""


def search(stage: StageConfig, request: Request, *, most: int = 10) -> Found:
    """Search all layouts of a stage on `request.gpus` GPUs.

    Args:
        stage: model, sequence length, global batch and frozen parts stay; `parallel` and the micro-batch are varied.
        request: GPUs, memory, hardware.
        most: how many that fit are returned.
    """
    fitting, others = [], []
    for layout in layouts(stage, request.gpus):
        plain, least = request.judge(layout), least_recomputation(layout, request)
        if not plain.fits:
            others.append(dataclasses.replace(plain, remedy=_remedy(least)))
        if least.fits:
            fitting.append(least)
    fitting.sort(key=lambda one: (round(one.time.seconds, 6), one.stage.parallel.replica_size, one.memory.total))
    if fitting:
        others = [one for one in others if one.time.seconds < fitting[0].time.seconds]
    others.sort(key=lambda one: one.over)
    return Found(_distinct(fitting, most), _distinct(others, _NEAREST))


def _distinct(ranked: list[Candidate], most: int) -> list[Candidate]:
    """The first of those that only differ in what changes neither estimate."""
    out: dict[tuple[float, float], Candidate] = {}
    for one in ranked:
        out.setdefault((one.time.seconds, one.memory.total), one)
        if len(out) == most:
            break
    return list(out.values())


def layouts(stage: StageConfig, gpus: int) -> Iterator[StageConfig]:
    """All layouts that the config accepts, without recomputation."""
    model = stage.model
    for tp in _divisors(model.num_query_groups):
        for pp in range(1, model.num_layers + 1):
            if gpus % (tp * pp):
                continue
            for cp in _divisors(gpus // (tp * pp)):
                for kind in CP_COMM_TYPES if cp > 1 else CP_COMM_TYPES[:1]:
                    for virtual in _VIRTUAL if pp > 1 else (1,):
                        for packs in _MICRO_BATCHES:
                            layout = _layout(stage, gpus, tp, pp, cp, kind, virtual, packs)
                            if layout is not None:
                                yield layout


def _layout(
    stage: StageConfig, gpus: int, tp: int, pp: int, cp: int, kind: str, virtual: int, packs: int
) -> StageConfig | None:
    """One layout; None if the config refuses it. Layers that do not divide are split as evenly as possible."""
    layers = stage.model.num_layers
    pipeline: dict[str, Any] = {}
    if pp > 1:
        if layers < pp * virtual:
            return None
        if layers % (pp * virtual):
            pipeline["pipeline_model_parallel_layout"] = str(nearly_even(layers, pp, virtual))
        elif virtual > 1:
            pipeline["num_virtual_stages_per_pipeline_rank"] = virtual
    try:
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            cp_comm_type=kind,
            overlap_grad_reduce=stage.parallel.overlap_grad_reduce,
            **pipeline,
        )
        layout = dataclasses.replace(
            stage, parallel=parallel, train=dataclasses.replace(stage.train, micro_batch_size=packs)
        )
        layout.check_layout(gpus)
    except ConfigError:
        return None
    return layout


def least_recomputation(layout: StageConfig, request: Request) -> Candidate:
    """The layout with the least recomputation that fits; with the most, if none does.

    None, or n layers of each model chunk (`block`) for the smallest n. Not the core attention (`selective`): what its
    recomputation keeps, the joint projection and the queries copied out of it, is as much as what it saves.
    """
    found = request.judge(recomputing(layout))
    if found.fits:
        return found
    deepest = max(pipeline_split(layout.parallel, layout.model.num_layers).layers)
    found = request.judge(_block(layout, deepest))
    low, high = 0, deepest  # the smallest number that fits lies in (low, high]
    while found.fits and high - low > 1:
        middle = (low + high) // 2
        tried = request.judge(_block(layout, middle))
        if tried.fits:
            found, high = tried, middle
        else:
            low = middle
    return found


def recomputing(layout: StageConfig, **settings: Any) -> StageConfig:
    """The layout with these recomputation settings, and no others."""
    none: dict[str, Any] = dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"))
    return dataclasses.replace(layout, parallel=dataclasses.replace(layout.parallel, **{**none, **settings}))


def _block(layout: StageConfig, layers: int) -> StageConfig:
    return recomputing(
        layout, recompute_granularity="full", recompute_method="block", recompute_num_layers=layers
    )  # fmt: skip


def _remedy(least: Candidate) -> str:
    if least.fits:
        return f"fits with {recomputation(least.stage.parallel)}"
    return f"{recomputation(least.stage.parallel)} leaves it {least.over / 1024**3:.1f} GiB over: more tp, pp or cp"


def recomputation(parallel: ParallelConfig) -> str:
    """Recomputation settings in a few words."""
    if parallel.recompute_granularity is None:
        return "no recomputation"
    if parallel.recompute_granularity == "selective":
        return "recompute selective"
    return f"recompute {parallel.recompute_method} {parallel.recompute_num_layers}"


def describe(stage: StageConfig, gpus: int) -> str:
    """A layout in one line."""
    parallel = stage.parallel
    split = pipeline_split(parallel, stage.model.num_layers)
    words = [f"tp{parallel.tensor_model_parallel_size}"]
    if split.ranks > 1:
        words.append(f"pp{split.ranks}" + (f"x{split.virtual}" if split.virtual > 1 else ""))
    if parallel.context_parallel_size > 1:
        words.append(f"cp{parallel.context_parallel_size} {parallel.cp_comm_type}")
    words.append(f"dp{parallel.data_parallel_size(gpus)}")
    if stage.train.micro_batch_size > 1:
        words.append(f"micro-batch {stage.train.micro_batch_size}")
    return " ".join([*words, recomputation(parallel)])


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
