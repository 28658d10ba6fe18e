"""The planner's closed formulas beside dry runs: memory at the peak and FLOPs of one rank, for 20 layouts of 4 models.

    python benchmarks/planner.py [--layers 4] [--tower-layers 4] [--only 14B] [--workers 2]

Needs no GPU; the dry run needs a C++ compiler. `--layers` is the depth of every pipeline rank's model chunk, and
`--tower-layers` that of the tower, so that a row takes seconds; 0 is the full depth. Few layers are the harder case:
what layers keep, which is easily counted, is a smaller part of the peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.config import StageConfig, load_run
from megatron_vita.config.pipeline import pipeline_split
from megatron_vita.dryrun import rows
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.planning.flops import rank_flops
from megatron_vita.planning.memory import MemoryEstimate, rank_memory
from megatron_vita.planning.rows import Row

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GIB = 1024**3
QWEN_72B = {
    "num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 29568, "num_attention_heads": 64, "num_query_groups": 8,
}  # fmt: skip
MEMORY, FLOPS = 0.03, 0.005
"""Largest relative errors of the formulas."""


@dataclass(frozen=True, slots=True)
class Case:
    """One rank of one layout."""

    model: str
    stage: int
    gpus: int
    rank: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of `parallel`."""
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    seq_length: int | None = None

    def config(self, layers: int, tower_layers: int = 0) -> StageConfig:
        """The recipe's stage in this layout, each model chunk `layers` deep, the tower `tower_layers`; 0: as the
        recipe's."""
        recipe = {"0.5B": "0.5b", "7B": "7b"}.get(self.model, "14b")
        stage = load_run(EXAMPLES / f"long_vita_{recipe}/run.yaml").stages[self.stage - 1]
        model = stage.model if self.model != "72B" else dataclasses.replace(stage.model, **QWEN_72B)
        fields: dict[str, Any] = {
            "tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp, "sequence_parallel": self.tp > 1,
        }  # fmt: skip
        kept = () if "recompute_granularity" in self.more else ("granularity", "method", "num_layers")
        fields |= {f"recompute_{name}": getattr(stage.parallel, f"recompute_{name}") for name in kept}
        parallel = dataclasses.replace(type(stage.parallel)(), **{**fields, **self.more})
        if tower_layers and model.vision is not None:
            model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, num_layers=tower_layers))
        if layers:
            chunks = len(pipeline_split(parallel, model.num_layers).layers)
            model = dataclasses.replace(model, num_layers=layers * chunks)
            if parallel.recompute_method == "block":
                parallel = dataclasses.replace(
                    parallel, recompute_num_layers=min(layers, parallel.recompute_num_layers or 1)
                )
        data = dataclasses.replace(stage.data, seq_length=self.seq_length or stage.data.seq_length)
        return dataclasses.replace(
            stage, data=data, model=model, parallel=parallel, train=dataclasses.replace(stage.train, **self.train)
        )

    @property
    def pp_rank(self) -> int:
        """Pipeline rank: the slowest coordinate."""
        return self.rank * self.pp // self.gpus

    def __str__(self) -> str:
        kind = f" {self.more.get('cp_comm_type', 'p2p')}" if self.cp > 1 else ""
        rest = " ".join(str(value) for key, value in self.more.items() if key != "cp_comm_type")
        degrees = f"tp{self.tp} pp{self.pp} cp{self.cp}{kind}"
        return f"{self.model} stage{self.stage} {degrees} of {self.gpus}, rank {self.rank} {rest}".strip()


_FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_NONE: dict[str, Any] = {"recompute_granularity": None}
CASES = (
    Case("0.5B", 1, 8, 0),
    Case("0.5B", 2, 8, 0),
    Case("0.5B", 3, 8, 0, cp=4),
    Case("0.5B", 4, 8, 0, cp=8),
    Case("0.5B", 2, 8, 0, tp=2, pp=2),
    Case("7B", 1, 32, 0, tp=4),
    Case("7B", 2, 32, 9, tp=4),
    Case("7B", 3, 32, 0, tp=4, cp=2),
    Case("7B", 4, 32, 0, tp=4, cp=8),
    Case("7B", 2, 32, 0, tp=2, pp=4),
    Case("7B", 3, 32, 16, tp=4, pp=2, cp=2, more={"cp_comm_type": "all_gather", **_NONE}),
    Case("14B", 1, 64, 0, tp=8),
    Case("14B", 2, 64, 9, tp=8),
    Case("14B", 3, 64, 0, tp=8, cp=2),
    Case("14B", 4, 64, 0, tp=8, cp=8),
    Case(
        "14B", 2, 64, 0, tp=4, pp=4, more={"num_virtual_stages_per_pipeline_rank": 2}, train={"global_batch_size": 512}
    ),
    Case("14B", 3, 64, 0, tp=4, cp=2, more={"cp_comm_type": "a2a", "recompute_granularity": "selective"}),
    Case("72B", 2, 256, 0, tp=8, pp=4, train={"global_batch_size": 512}),
    Case("72B", 2, 256, 255, tp=8, pp=4, train={"global_batch_size": 512}),
    Case("72B", 4, 256, 192, tp=8, pp=4, cp=8, more=_FULL),
)


def planned_row(stage: StageConfig, rank: int, row: rows.Row) -> tuple[Row, int]:
    """A row of the dry run as the planner takes it, its labels as many on every context rank as on this one's; and the
    tiles that this rank encodes."""
    parallel = stage.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    cp_rank = rank // tp % cp
    layout = SequenceLayout(row.documents, cp, parallel.sequence_shards)
    assert stage.model.vision is not None, "every case has a tower"
    routes = TileRoutes(layout, row.first_token, stage.model.vision.tokens_per_tile, tp)
    labelled = np.zeros(layout.length, dtype=bool)
    for start, stop in row.answers:
        labelled[start:stop] = True
    count = int(labelled[layout.local_positions(cp_rank)].sum())
    return Row(row.documents, len(row.first_token), count * cp), len(routes.tiles_of(rank % (tp * cp)))


def planned_memory(case: Case, stage: StageConfig, planned: Sequence[Row]) -> MemoryEstimate:
    """Memory by formula, of the row with the most; with several in flight, of the first, which has the most tiles."""
    alone = case.pp_rank == case.pp - 1
    estimates = [rank_memory(stage, case.gpus, case.pp_rank, row) for row in planned]
    return max(estimates, key=lambda one: one.total) if alone else estimates[0]


def main() -> int:
    """Print a line per layout; returns the exit status: 1 if a formula misses its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=4, help="layers of a model chunk; 0: the full depth")
    parser.add_argument("--tower-layers", type=int, default=4, help="layers of the tower; 0: the full depth")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--workers", type=int, default=None, help="dry runs at once")
    arguments = parser.parse_args()
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        os.environ.setdefault(variable, "/nowhere")
    cases = [case for case in CASES if arguments.only in str(case)]
    stages = [case.config(arguments.layers, arguments.tower_layers) for case in cases]
    jobs = [
        DryRunJob(stage=stage, world_size=case.gpus, rank=case.rank) for case, stage in zip(cases, stages, strict=True)
    ]
    print(f"{'GiB at the peak, TFLOP a micro-batch':66} {'dry run':>8} {'formula':>8} {'ratio':>6}", end=" ")
    print(f"{'dry run':>9} {'ratio':>7}  peak at: formula; dry run")
    missed = 0
    for case, stage, report in zip(cases, stages, run_jobs(jobs, workers=arguments.workers), strict=True):
        if report.error:
            print(f"{case!s:66} {report.error}")
            missed += 1
            continue
        made = rows.rows_of(stage, stage.parallel.data_parallel_size(case.gpus), report.micro_batches)
        planned = [planned_row(stage, case.rank, row) for row in made]
        estimate = planned_memory(case, stage, [row for row, _ in planned])
        flops = sum(rank_flops(stage, case.pp_rank, row, tiles=tiles) for row, tiles in planned)
        memory, operations = estimate.total / report.peak_bytes, flops / report.flops
        missed += abs(memory - 1) > MEMORY or abs(operations - 1) > FLOPS
        where = f"{report.peak_module} {'backward' if report.peak_in_backward else 'forward'}"
        print(f"{case!s:66} {report.peak_bytes / GIB:8.3f} {estimate.total / GIB:8.3f} {memory:6.3f}", end=" ")
        print(f"{report.flops / report.micro_batches / 1e12:9.2f} {operations:7.4f}  {estimate.peak_at}; {where}")
        sys.stdout.flush()
    print(f"{len(cases)} layouts, {missed} beyond {MEMORY:.0%} in memory or {FLOPS:.1%} in FLOPs")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
