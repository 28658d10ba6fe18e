"""One stage, killed twice and resumed in other layouts, has the losses of an uninterrupted run on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vita.training import metrics
from megatron_vita.training.ledger import LedgerLine
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import ledger, make_shards, recipe

INTERLEAVED = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t|t|L"}
RING = {"context_parallel_size": 2, "cp_comm_type": "p2p", "overlap_grad_reduce": True}
ULYSSES = {"context_parallel_size": 2, "cp_comm_type": "a2a"}
GATHER = {"context_parallel_size": 2, "cp_comm_type": "all_gather"}
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SETTINGS: dict[str, Any] = {
    "model": {"num_layers": 3},
    "train": {"train_iters": 6, "global_batch_size": 4, "eval_interval": 3, "eval_iters": 2},
    "checkpoint": {"save_interval": 2},
}


def _train(folder: Path, save: str, parallel: dict[str, Any], last: int | None) -> None:
    """Train to the end, or until every rank is interrupted after step `last`, as a kill would."""
    step = metrics.Progress.step

    def dying(self: metrics.Progress, line: LedgerLine) -> None:
        step(self, line)
        if line.iteration == last:
            raise KeyboardInterrupt

    data = {"valid_data_path": str(folder / "shards/train"), "reset_per_document": True}
    settings = recipe(folder, save, ({"name": "only", "parallel": parallel},), data=data, **SETTINGS)
    with mock.patch.object(metrics.Progress, "step", dying):
        try:
            run_stages(settings)
        except KeyboardInterrupt:
            return
    assert last is None, "the run was not interrupted"


def _validation(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "only/validation.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["loss"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts", [(INTERLEAVED, RING, SPLIT), (ULYSSES, INTERLEAVED, GATHER)], ids=["to the ring", "from heads"]
)
def test_a_killed_run_goes_on_in_another_layout(tmp_path: Path, layouts: tuple[dict[str, Any], ...]) -> None:
    make_shards(tmp_path)
    run_ranks(1, _train, tmp_path, "alone", {}, None)
    for parallel, last in zip(layouts, (3, 5, None), strict=True):  # goes on from the checkpoints of steps 2 and 4
        run_ranks(2, _train, tmp_path, "spread", parallel, last)
    many, one = ledger(tmp_path, "spread", "only"), ledger(tmp_path, "alone", "only")
    assert [line["iteration"] for line in many] == [1, 2, 3, 4, 5, 6]
    for spread, whole in zip(many, one, strict=True):
        assert spread["consumed_packs"] == whole["consumed_packs"]
        assert spread["lr"] == whole["lr"]
        assert spread["loss"] == pytest.approx(whole["loss"], rel=2e-4)
        assert spread["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-3)
    assert sorted(_validation(tmp_path / "alone")) == [0, 3, 6]
    assert _validation(tmp_path / "spread") == pytest.approx(_validation(tmp_path / "alone"), rel=2e-4)
