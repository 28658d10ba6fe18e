"""The samples of a step, computed from the ledger, are those that the loader gave to every rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import ConfigError
from megatron_vita.training import faults
from megatron_vita.training.replay import data_of_step
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.scripts import load_script
from tests.training.runs import ledger, make_shards, recipe

STEPS = 14  # more than two epochs of the 40 samples


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/inspect_data.py")


def _train(folder: Path, parallel: dict[str, int]) -> None:
    """Train, and compare what the loader gave with what the ledger tells."""
    given: list[tuple[list[int], list[int]]] = []
    mask = faults.FailedSamples.mask

    def watched(self: faults.FailedSamples, step: StepBatches) -> tuple[StepBatches, tuple[int, ...]]:
        given.append((list(step.pack_ids), list(step.sample_ids)))
        return mask(self, step)

    stage = {
        "name": "only",
        "parallel": parallel,
        "data": {"reset_per_document": True},
        "train": {"train_iters": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    }
    with mock.patch.object(faults.FailedSamples, "mask", watched):
        run_stages(recipe(folder, "save", (stage,)))
    shards = ShardSet(str(folder / "shards/train"))
    assert shards.num_packs * 2 < STEPS * 4, "not two epochs"
    dist.barrier()
    told = [data_of_step(shards, folder / "save/only", step) for step in range(1, STEPS + 1)]
    assert [(one.packs, one.samples) for one in told] == given
    assert [one.masked for one in told] == [line["failed_samples"] for line in ledger(folder, "save", "only")]
    assert any(one.masked for one in told)
    assert all(set(one.masked) <= set(one.samples) for one in told)


@pytest.mark.parametrize(
    "parallel", [{}, pytest.param({"context_parallel_size": 2}, marks=pytest.mark.slow)], ids=["alone", "context"]
)
def test_a_step_took_what_the_ledger_says(
    tmp_path: Path, parallel: dict[str, int], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, broken=2)
    run_ranks(2 if parallel else 1, _train, tmp_path, parallel)
    prefix, stage = tmp_path / "shards/train", tmp_path / "save/only"
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    shards = ShardSet(str(tmp_path / "moved/train"))
    wanted = data_of_step(shards, stage, 9)
    arguments = [str(tmp_path / "moved" / prefix.name), "--ledger", str(stage)]
    assert tool.main([*arguments, "--step", "9"]) == 0
    assert f"step 9, samples: {', '.join(map(str, wanted.samples))}\n" in capsys.readouterr().out
    assert tool.main([*arguments, "--step", "99"]) == 2
    assert "has no line of step 99" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(arguments)


def test_other_shards_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    run_ranks(1, _train_one_step, tmp_path)
    make_shards(tmp_path, seed=4)
    shards = ShardSet(str(tmp_path / "shards/train"))
    with pytest.raises(ConfigError, match="was trained on shards with the digest"):
        data_of_step(shards, tmp_path / "save/only", 1)
    with pytest.raises(ConfigError, match="Give a stage's folder"):
        data_of_step(shards, tmp_path / "save", 1)


def _train_one_step(folder: Path) -> None:
    run_stages(recipe(folder, "save", ({"name": "only", "train": {"train_iters": 1}},)))
