"""The same steps with real tensors: one rank alone, with collectives that fill in its own values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vita.config import load_run
from megatron_vita.dryrun.collectives import Collectives
from megatron_vita.dryrun.jobs import DryRunJob, run_jobs
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.text import comparison

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/quickstart/run.yaml"


@pytest.mark.slow
def test_a_rank_alone_steps_as_the_dry_run_says(tmp_path: Path) -> None:
    """Parameters, weights, gradients, optimizer state and bytes by collective are those of the dry run; the loss and
    the norm are finite, else the step would have raised."""
    environment = {**os.environ, "RUN": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.dryrun.real", RECIPE], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    real = Report.from_json(json.loads(done.stdout))
    flags = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "true", "--context-parallel-size", "2")
    stage = load_run(ROOT / RECIPE, flags, expand=False).stages[0]
    (dry,) = run_jobs([DryRunJob(stage=stage, world_size=4, rank=3, steps=2)])
    assert dry.error is None
    assert (real.parameters, real.trainable, real.tiles) == (dry.parameters, dry.trainable, dry.tiles)
    for part in ("weights", "gradients", "optimizer"):
        assert real.before[part] == pytest.approx(dry.before[part], rel=0.05)
    counted = [
        {(one.kind, one.group, one.phase): (one.calls, one.nbytes) for one in report.collectives}
        for report in (real, dry)
    ]
    assert counted[0] == counted[1]


def test_the_comparison_names_ratios() -> None:
    dry = Report(stage="s", world_size=1, rank=0, before={"weights": 100}, peak_bytes=200)
    real = Report(stage="s", world_size=1, rank=0, peak_bytes=210, measured={"before": 110.0, "peak": 230.0})
    assert "before 1.100, peak 1.150" in comparison(dry, real)
    assert "nothing to compare" in comparison(dry, Report(stage="s", world_size=1, rank=0))


def test_a_list_of_outputs_counts_whole() -> None:
    outs = [torch.zeros(2, 3) for _ in range(4)]
    kind, counted = Collectives(real=True)._listed(outs, torch.ones(2, 3))
    assert (kind, counted.numel()) == ("all_gather", 24)
    assert all(bool(out.all()) for out in outs)
