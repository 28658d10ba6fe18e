"""Whole runs: equal losses in every layout, exact resumption, errors before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.convert.exporter import export
from megatron_vita.data.loading.loader import PackLoader, StepBatches
from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.errors import CheckpointError, ConfigError, DataError
from megatron_vita.training import ledger as ledgers
from megatron_vita.training import loop
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import STAGES, alone, ledger, make_shards, recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    make_shards(path)
    return path


def train(folder: Path, save: str, **options: object) -> None:
    """Run all stages on one rank."""
    run_stages(recipe(folder, save, **options))  # type: ignore[arg-type]


@pytest.mark.slow
def test_four_layouts_learn_what_one_rank_learns(folder: Path) -> None:
    run_ranks(2, train, folder, "spread")
    run_ranks(1, _train_alone, folder, "alone")
    for stage in STAGES:
        many, one = ledger(folder, "spread", stage["name"]), ledger(folder, "alone", stage["name"])
        assert len(many) == len(one) == 3
        for spread, whole in zip(many, one, strict=True):
            assert spread["consumed_packs"] == whole["consumed_packs"], "a layout must not change what a step sees"
            assert spread["loss"] == pytest.approx(whole["loss"], rel=2e-4), stage["name"]
            assert spread["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-3), stage["name"]
    changed = _changed(folder / "spread/align", folder / "spread/learn")
    assert any(name.startswith("vision_model") for name in changed)
    frozen = _changed(folder / "spread/learn", folder / "spread/longer")
    assert not any(name.startswith("vision_model") for name in frozen), "the tower was frozen in the last two stages"
    _check_history(folder, "spread")


def _check_history(folder: Path, save: str) -> None:
    """The last checkpoint records every stage and its data, for the model card."""
    state = checkpoint.read_state(folder / save / STAGES[-1]["name"])
    manifest = load_manifest(folder / "shards/train")
    assert [(one.recipe["name"], one.iteration) for one in state.history] == [(one["name"], 3) for one in STAGES]
    for record in state.history:
        assert record.manifest_digest == manifest.digest
        assert record.data is not None
        assert (record.data.name, record.data.seq_length) == ("train", manifest.seq_length)
        told = [(one.name, one.read, one.used, one.rejected, one.tokens) for one in record.data.sources]
        assert told == [(one.name, one.read, one.used, one.read - one.used, one.tokens) for one in manifest.sources]


def _train_alone(folder: Path, save: str) -> None:
    train(folder, save, stages=alone())


def _changed(before: Path, after: Path) -> list[str]:
    first, second = (checkpoint.tensor_digests(checkpoint.resolve(path)) for path in (before, after))
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


LONG = {
    "train": {"train_iters": 6, "global_batch_size": 4, "eval_interval": 5, "eval_iters": 1},
    "checkpoint": {"save_interval": 2},
    # layer-wise learning rates: several parameter groups, which must be matched on resume
    "optimizer": {"weight_decay": 0.1, "vision_model_lr_mult": 0.1, "vision_model_lr_decay_rate": 0.9},
}


def _train_and_die(folder: Path, save: str, at: int) -> None:
    """Train until step `at` is in the ledger, then stop like a killed process."""
    write = ledgers.Ledger.write

    def dying(self: ledgers.Ledger, line: Mapping[str, Any]) -> None:
        write(self, line)
        if line["iteration"] == at and "lr" in line:
            raise KeyboardInterrupt

    with mock.patch.object(ledgers.Ledger, "write", dying):
        try:
            _train_one_stage(folder, save)
        except KeyboardInterrupt:
            return
    raise AssertionError("the run was not interrupted")


def _train_one_stage(folder: Path, save: str) -> None:
    one = ({"name": "only", "data": {"reset_per_document": True}},)
    sections = {name: dict(values) for name, values in LONG.items()}
    sections["checkpoint"]["save"] = str(folder / save)
    sections["data"] = {**_paths(folder), "valid_data_path": str(folder / "shards/train")}
    train(folder, save, stages=one, **sections)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    run_ranks(1, _train_one_stage, folder, "whole")
    run_ranks(1, _train_and_die, folder, "killed", 6)
    assert [line["iteration"] for line in ledger(folder, "killed", "only")] == [1, 2, 3, 4, 5, 6]
    run_ranks(1, _train_one_stage, folder, "killed")
    whole, resumed = ledger(folder, "whole", "only"), ledger(folder, "killed", "only")
    for one, other in zip(whole, resumed, strict=True):
        for key in ("iteration", "loss", "grad_norm", "lr", "consumed_packs"):
            assert one[key] == other[key], key
    validated = [(folder / save / "only/validation.jsonl").read_text() for save in ("whole", "killed")]
    assert validated[0] == validated[1]
    assert validated[0].count("\n") == 3, "before the first step, at the fifth, after the last"
    ends = [checkpoint.tensor_digests(checkpoint.resolve(folder / save / "only")) for save in ("whole", "killed")]
    assert ends[0] == ends[1]


def _other_heads(folder: Path, start: str) -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads=4, the recipe has 2"):
        train(
            folder,
            "other",
            stages=alone(STAGES[:1]),
            model={"num_attention_heads": 2, "kv_channels": 16},
            checkpoint={"pretrained_checkpoint": start},
        )


@pytest.mark.slow
def test_a_run_starts_from_a_hugging_face_folder_as_from_the_checkpoint_it_was_made_of(folder: Path) -> None:
    run_ranks(1, partial(train, stages=alone(STAGES[:1])), folder, "first")
    trained = checkpoint.resolve(folder / "first/align")
    export(trained, folder / "hf", "internvl")
    for save, start in (("from_ours", trained), ("from_theirs", folder / "hf")):
        begin = partial(train, stages=STAGES[1:2], checkpoint={"pretrained_checkpoint": str(start)})
        run_ranks(2, begin, folder, save)
    ours, theirs = (ledger(folder, save, "learn") for save in ("from_ours", "from_theirs"))
    assert [(one["loss"], one["grad_norm"]) for one in ours] == [(one["loss"], one["grad_norm"]) for one in theirs]
    assert checkpoint.read_state(folder / "from_theirs/learn").base_models == {"model": "hf"}
    run_ranks(1, _other_heads, folder, str(folder / "hf"))


def _refusals(folder: Path) -> None:
    """All cases in one process, which initialises torch.distributed once."""
    with pytest.raises(ConfigError, match=r"length of a pack is 96 in the shards, but data.seq_length is 64"):
        run_stages(recipe(folder, "bad", alone(), data={"seq_length": 64}))
    with pytest.raises(ConfigError, match="token ids reach up to"):
        run_stages(recipe(folder, "bad", alone(), model={"vocab_size": 100}))
    with pytest.raises(ConfigError, match="tokenizer"):
        run_stages(recipe(folder, "bad", alone(), data={"tokenizer_model": ""}))
    with pytest.raises(ConfigError, match="absent"):
        run_stages(recipe(folder, "bad", alone(), data={"data_path": str(folder / "absent")}))
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        run_stages(recipe(folder, "bad", alone()), only=2)
    with pytest.raises(ConfigError, match="stages 1 to 4"):
        run_stages(recipe(folder, "bad", alone()), only=5)
    with pytest.raises(ConfigError, match="absent"):
        run_stages(recipe(folder, "bad", alone(), checkpoint={"pretrained_checkpoint": str(folder / "absent")}))
    with pytest.raises(ConfigError, match=r"checkpoint.save=/dev/null/x: cannot be written"):
        run_stages(recipe(folder, "bad", alone(), checkpoint={"save": "/dev/null/x"}))
    assert not (folder / "bad").exists(), "a rejected run must not write anything"


def test_a_run_that_cannot_work_fails_before_it_writes(folder: Path) -> None:
    run_ranks(1, _refusals, folder)


def _other_settings(folder: Path) -> None:
    stages = alone(STAGES[:1])
    run_stages(recipe(folder, "twice", stages))
    assert run_stages(recipe(folder, "twice", stages, logging={"log_interval": 7})), "a finished stage is left alone"
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay was 0.0 and is 0.1"):
        run_stages(recipe(folder, "twice", stages, optimizer={"weight_decay": 0.1}))
    with pytest.raises(ConfigError, match=r"train.train_iters was 3 and is 2"):
        run_stages(recipe(folder, "twice", alone(STAGES[:1]), train={"train_iters": 2}))


def test_a_run_with_other_settings_is_not_continued_in_silence(folder: Path) -> None:
    run_ranks(1, _other_settings, folder)


def _other_shards(folder: Path) -> None:
    stages = alone(STAGES[:1])
    run_stages(recipe(folder, "made_anew", stages))
    make_shards(folder, seed=4)
    with pytest.raises(ConfigError, match=r"digest of the shards .*train was \w+ and is \w+"):
        run_stages(recipe(folder, "made_anew", stages))


def test_a_run_is_not_continued_on_shards_that_were_made_anew(tmp_path: Path) -> None:
    make_shards(tmp_path)
    run_ranks(1, _other_shards, tmp_path)


def _one_rank_fails(folder: Path) -> None:
    read, rank = PackLoader.__next__, dist.get_rank()

    def failing(self: PackLoader) -> StepBatches:
        step = read(self)
        if rank == 1 and step.consumed_packs > 4:
            raise DataError("rank 1 alone cannot read on")
        return step

    # rank 1 must report at once and exit; its exit ends rank 0, which waits for it in a collective
    error, words = (DataError, "rank 1 alone") if rank == 1 else (RuntimeError, "")
    with mock.patch.object(PackLoader, "__next__", failing), pytest.raises(error, match=words):
        train(folder, "one_fails", stages=STAGES[1:2])


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_run(folder: Path) -> None:
    run_ranks(2, _one_rank_fails, folder)


@pytest.mark.slow
def test_pictures_that_do_not_decode_are_masked_on_every_rank(tmp_path: Path) -> None:
    make_shards(tmp_path, broken=2)
    run_ranks(2, _train_broken, tmp_path, "lenient", 100)
    lines = ledger(tmp_path, "lenient", "learn")
    assert any(line["failed_samples"] for line in lines)
    assert all(line["loss"] is not None for line in lines)
    run_ranks(2, _expect_budget, tmp_path)


@pytest.mark.slow
def test_a_sample_that_fails_every_epoch_counts_once(tmp_path: Path) -> None:
    make_shards(tmp_path, broken=2)
    run_ranks(2, _train_epochs, tmp_path, "spread", {"pipeline_model_parallel_size": 2})
    run_ranks(1, _train_epochs, tmp_path, "alone", {})
    spread, whole = ledger(tmp_path, "spread", "epochs"), ledger(tmp_path, "alone", "epochs")
    assert sum(bool(line["failed_samples"]) for line in whole) > 1
    for one, other in zip(spread, whole, strict=True):  # the last pipeline stage decodes nothing but masks too
        assert (one["failed_samples"], one["num_labels"]) == (other["failed_samples"], other["num_labels"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def _train_epochs(folder: Path, save: str, parallel: dict[str, int]) -> None:
    stage = {"name": "epochs", "parallel": parallel, "train": {"train_iters": 8, "global_batch_size": 4}}
    train(folder, save, stages=(stage,), data={"max_failed_samples": 1, **_paths(folder)})


def test_pictures_that_do_not_decode_are_masked_in_validation(tmp_path: Path) -> None:
    make_shards(tmp_path, broken=2)
    run_ranks(1, _validate_broken, tmp_path)


def _validate_broken(folder: Path) -> None:
    seen: list[StepBatches] = []

    def watched(*args: object) -> float:
        seen.extend(args[-1])  # type: ignore[arg-type]
        return 1.0

    paths = _paths(folder)
    with mock.patch.object(loop, "validate", watched):
        stage = {"name": "a", "train": {"train_iters": 1, "eval_iters": 8}}
        data = {"max_failed_samples": 9, "valid_data_path": paths["data_path"], **paths}
        train(folder, "valid", stages=(stage,), data=data)
    assert any(step.masked and step.num_labels < sum(step.label_counts) for step in seen)


def _train_broken(folder: Path, save: str, budget: int) -> None:
    stage = {**STAGES[1], "train": {"train_iters": 6, "global_batch_size": 4}}
    train(folder, save, stages=(stage,), data={"max_failed_samples": budget, **_paths(folder)})


def _paths(folder: Path) -> dict[str, object]:
    return {"data_path": str(folder / "shards/train"), "tokenizer_model": str(folder / "tokenizer")}


def _expect_budget(folder: Path) -> None:
    with pytest.raises(DataError, match=r"more than data.max_failed_samples=0"):
        _train_broken(folder, "strict", 0)


def _retrained(folder: Path) -> None:
    stages = alone(STAGES[:2])
    run_stages(recipe(folder, "chain", stages))
    shutil.rmtree(folder / "chain" / "align")
    run_stages(recipe(folder, "chain", stages, train={"seed": 6}), only=1)
    with pytest.raises(ConfigError, match="weights it started from are no longer those of"):
        run_stages(recipe(folder, "chain", ({**stages[0], "train": {**stages[0]["train"], "seed": 6}}, stages[1])))


@pytest.mark.slow
def test_a_stage_is_not_complete_when_the_one_before_was_trained_anew(folder: Path) -> None:
    run_ranks(1, _retrained, folder)
