"""Formulas against dry runs of two layers at full width: memory within 3 %, FLOPs within 0.5 %.

Few layers are the hard case: what a layer keeps is a smaller part of the peak. benchmarks/planner.py has 20 layouts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import StageConfig
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.dryrun.library import build
from megatron_vita.dryrun.rows import rows_of
from megatron_vita.errors import ConfigError
from megatron_vita.planning.flops import rank_flops
from megatron_vita.planning.measure import Measured, first_rank, measure, pp_ranks, shallow
from megatron_vita.planning.memory import rank_memory
from megatron_vita.planning.rows import Row
from tests.scripts import load_script

benchmark = load_script("benchmarks/planner.py")
Case = benchmark.Case


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.setenv(variable, "/nowhere")


def config(case: Any) -> StageConfig:
    """Two layers a chunk, and one of the tower."""
    made: StageConfig = case.config(2, 1)
    return made


FULL = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
CASES = (
    Case("14B", 2, 64, 9, tp=8),
    Case("14B", 1, 64, 0, tp=8),
    Case("7B", 3, 32, 0, tp=2, cp=2, more={"cp_comm_type": "a2a", "recompute_granularity": None}),
    Case("7B", 3, 32, 0, tp=4, cp=2, more={"cp_comm_type": "all_gather", **FULL}),
    Case("7B", 2, 32, 0, tp=4, pp=2),
    Case("0.5B", 2, 8, 4, tp=2, pp=2),
    Case("0.5B", 3, 8, 0, cp=4),
    Case("14B", 2, 8, 0, tp=8, seq_length=1024),  # the optimizer's step has the peak
)


@pytest.fixture(scope="module")
def reports() -> Any:
    """Dry runs of all cases, in one process."""
    try:
        build()
    except ConfigError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
            patch.setenv(variable, "/nowhere")
        jobs = [DryRunJob(stage=config(case), world_size=case.gpus, rank=case.rank) for case in CASES]
        return dict(zip(map(str, CASES), run_jobs(jobs, workers=2), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulas_meet_the_dry_run(case: Any, reports: Any) -> None:
    stage, report = config(case), reports[str(case)]
    assert report.error is None, report.error
    rows = rows_of(stage, stage.parallel.data_parallel_size(case.gpus), report.micro_batches)
    planned = [benchmark.planned_row(stage, case.rank, row) for row in rows]
    memory = benchmark.planned_memory(case, stage, [row for row, _ in planned])
    assert memory.before == pytest.approx(
        sum(report.before[part] for part in ("weights", "gradients", "optimizer")), 0.01
    )
    assert memory.total == pytest.approx(report.peak_bytes, rel=benchmark.MEMORY), (memory, report.peak)
    flops = sum(rank_flops(stage, case.pp_rank, row, tiles=tiles) for row, tiles in planned)
    assert flops == pytest.approx(report.flops, rel=benchmark.FLOPS)


def test_shallow_stages_keep_the_layout() -> None:
    deep = Case("14B", 3, 64, 0, tp=8, pp=2, cp=2).config(0)
    two = shallow(deep, 2)
    assert (two.model.num_layers, two.parallel.recompute_num_layers) == (4, 2)
    uneven = dataclasses.replace(deep.parallel, pipeline_model_parallel_layout="Et*20|t*28L")
    assert shallow(dataclasses.replace(deep, parallel=uneven), 2).model.num_layers == 4
    half = dataclasses.replace(deep.parallel, recompute_num_layers=12)
    assert shallow(dataclasses.replace(deep, parallel=half), 4).parallel.recompute_num_layers == 2


def test_what_formulas_miss_is_extrapolated_by_the_layer() -> None:
    stage, row = Case("7B", 2, 32, 0, tp=4, pp=2).config(0), Row((16384,), 40, 8192)
    ranks = pp_ranks(stage)
    assert (ranks, first_rank(stage, 32, 1)) == ([0, 1], 16)

    def run(jobs: Any) -> list[Measured]:
        """Dry runs that find 100 bytes and 10 bytes a layer more than the formulas, and a FLOP a layer."""
        return [found(*job) for job in jobs]

    def found(*job: Any) -> Measured:
        one, rank = job
        layers = one.model.num_layers / 2
        memory = rank_memory(one, 32, rank // 16, row).total + 100 + 10 * layers
        return Measured(memory, rank_flops(one, rank // 16, row, tiles=10) + layers, 10, row.labelled)

    for corrected in measure(stage, 32, row, run):
        assert corrected.memory - corrected.formula == pytest.approx(100 + 10 * 14)
        assert corrected.flops - corrected.formula_flops == pytest.approx(14, abs=1)
