"""A whole run through an interleaved pipeline: training, validation, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import alone, ledger, make_shards, recipe

LAYOUT = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|t|t|L"}
STAGES: tuple[dict[str, Any], ...] = (
    {"name": "align", "parallel": LAYOUT, "train": {"freeze_vision_model": True, "freeze_language_model": True}},
    {"name": "learn", "parallel": LAYOUT},
)


def _train(folder: Path, save: str, stages: tuple[dict[str, Any], ...]) -> None:
    data = {"valid_data_path": str(folder / "shards/train")}
    run_stages(recipe(folder, save, stages, data=data))


@pytest.mark.slow
def test_an_interleaved_run_learns_what_one_rank_learns(tmp_path: Path) -> None:
    make_shards(tmp_path)
    run_ranks(2, _train, tmp_path, "spread", STAGES)
    run_ranks(1, _train, tmp_path, "alone", alone(STAGES))
    for stage in ("align", "learn"):
        for spread, whole in zip(ledger(tmp_path, "spread", stage), ledger(tmp_path, "alone", stage), strict=True):
            assert spread["loss"] == pytest.approx(whole["loss"], rel=2e-4)
            assert spread["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-3)
        assert _validation(tmp_path / "spread" / stage) == pytest.approx(
            _validation(tmp_path / "alone" / stage), rel=2e-4
        )


def _validation(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "validation.jsonl").read_text().splitlines()]
