"""A run goes on where its data, tokenizer and start lie elsewhere, and with the settings that may change."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vita import checkpoint
from megatron_vita.config import StageConfig, VisionConfig
from megatron_vita.convert.exporter import export
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.training.same_run import check_same_run
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import ledger, make_shards, recipe

STAGE = {"name": "only", "data": {"reset_per_document": True}, "checkpoint": {"save_interval": 1}}


def _train(folder: Path, save: str, iters: int, data: dict[str, Any], heard: str = "", **sections: Any) -> None:
    """Train; what is logged must contain `heard`."""
    records: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vita")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    run_stages(recipe(folder, save, (STAGE,), train={"train_iters": iters}, data=data, **sections))
    assert any(heard in text for text in records), records


def _paths(folder: Path) -> dict[str, str]:
    prefix = str(folder / "shards/train")
    return {"data_path": prefix, "valid_data_path": prefix, "tokenizer_model": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a Hugging Face folder to start from, and a run of two steps from it."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder)
    run_ranks(1, _train, folder, "start", 1, _paths(folder))
    export(checkpoint.resolve(folder / "start/only"), folder / "hf", "internvl")
    start = {"pretrained_checkpoint": str(folder / "hf")}
    run_ranks(1, partial(_train, checkpoint=start), folder, "two", 2, _paths(folder))
    return folder


@pytest.mark.slow
def test_a_run_goes_on_after_everything_has_moved_and_to_more_steps(made: Path, tmp_path: Path) -> None:
    for name in ("shards", "tokenizer", "hf", "two"):
        for path in shutil.copytree(made / name, tmp_path / f"moved_{name}").rglob("*"):
            os.utime(path, (1, 1))
    os.rename(made / "shards", made / "gone")
    try:
        data = {
            "data_path": str(tmp_path / "moved_shards/train"),
            "valid_data_path": None,
            "tokenizer_model": str(tmp_path / "moved_tokenizer/tokenizer.json"),
            "num_workers": 2,
        }
        start = {"pretrained_checkpoint": str(tmp_path / "moved_hf"), "async_save": False}
        longer = (
            "train.train_iters was 2 and is 4: the warmup ends at step 2 (before: 1), the cosine schedule at step 4"
        )
        again = partial(_train, checkpoint=start, model={"transformer_impl": "local"})
        longer = "the warmup ends at step 0 (before: 0), the cosine schedule at step 4 (before: 2)"
        run_ranks(1, again, tmp_path, "moved_two", 4, data, longer)
    finally:
        os.rename(made / "gone", made / "shards")
    assert [line["iteration"] for line in ledger(tmp_path, "moved_two", "only")] == [1, 2, 3, 4]
    state = checkpoint.read_state(tmp_path / "moved_two/only")
    assert state.iteration == 4
    assert state.stage.data.data_path == data["data_path"], "a checkpoint holds the settings it was made with"
    copy = checkpoint.resolve(tmp_path / "moved_two/only") / "tokenizer"
    assert VitaTokenizer.load(copy).sha256 == VitaTokenizer.load(made / "tokenizer").sha256


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 1])
def test_more_steps_are_what_they_would_have_been_under_a_constant_rate(made: Path, stopped: int) -> None:
    """Raising train_iters changes nothing but the schedule: with a constant rate, nothing at all."""
    constant = {"lr_decay_style": "constant", "min_lr": 1e-3, "lr_warmup_fraction": 0.0}
    train = partial(_train, optimizer=constant)
    name = f"raised_{stopped}"
    run_ranks(1, train, made, name, stopped, _paths(made))
    run_ranks(1, train, made, name, 3, _paths(made))
    run_ranks(1, train, made, f"{name}_whole", 3, _paths(made))
    ends = [checkpoint.tensor_digests(checkpoint.resolve(made / save / "only")) for save in (name, f"{name}_whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_another_rate_is_said_and_used_by_every_group(made: Path) -> None:
    """Weight decay and layer-wise rates make several parameter groups."""
    groups = {"weight_decay": 0.1, "vision_model_lr_mult": 0.1, "vision_model_lr_decay_rate": 0.9}
    constant = {"lr_decay_style": "constant", "min_lr": 0.0, **groups}
    shutil.copytree(made / "start", made / "rate_start")
    train = partial(_train, made, "rate", data=_paths(made))
    run_ranks(1, partial(train, iters=1, optimizer=constant))
    before = checkpoint.read_tensors(checkpoint.resolve(made / "rate/only"))
    now = {**constant, "lr": 1e-9, "clip_grad": 0.5}
    said = "optimizer.lr was 0.001 and is 1e-09; optimizer.clip_grad was 1.0 and is 0.5"
    run_ranks(1, partial(train, iters=2, heard=said, optimizer=now))
    assert [line["lr"] for line in ledger(made, "rate", "only")] == [1e-3, 1e-9]
    after = checkpoint.read_tensors(checkpoint.resolve(made / "rate/only"))
    for name in before:
        if name.startswith(("language_model", "vision")):
            whole = tuple(slice(0, size) for size in before.shape(name))
            moved = abs(after.read(name, whole) - before.read(name, whole)).max()
            assert moved < 1e-6, f"{name} moved by {moved}, as with the old rate"


def _with_vision(stage: StageConfig, vision: VisionConfig | None) -> StageConfig:
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, vision=vision))


def test_other_content_is_refused_wherever_it_lies(made: Path, tmp_path: Path) -> None:
    found = checkpoint.resolve(made / "two/only")
    state = checkpoint.read_state(found)
    shutil.copytree(made / "hf", tmp_path / "hf")
    weights = next((tmp_path / "hf").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    check_same_run(state.stage, state, found, made / "hf")
    with pytest.raises(ConfigError, match="the weights it started from are no longer those of"):
        check_same_run(state.stage, state, found, tmp_path / "hf")
    old = dataclasses.replace(state, extra={"started_from": state.extra["started_from"]})
    check_same_run(state.stage, old, found, tmp_path / "hf")  # of an earlier release: cannot be compared
    vision = state.stage.model.vision
    assert vision is not None
    check_same_run(_with_vision(state.stage, dataclasses.replace(vision, tiles_per_batch=3)), state, found, made / "hf")
    wider = dataclasses.replace(vision, tiles_per_batch=3, layer_scale_init=0.5)
    with pytest.raises(ConfigError, match=r"settings \(model.vision.layer_scale_init was 0.1 and is 0.5\)"):
        check_same_run(_with_vision(state.stage, wider), state, found, made / "hf")
    with pytest.raises(ConfigError, match=r"model.vision.num_layers was \d+ and is None"):
        check_same_run(_with_vision(state.stage, None), state, found, made / "hf")
    make_shards(tmp_path, seed=4)
    data = dataclasses.replace(state.stage.data, data_path=str(tmp_path / "shards/train"))
    with pytest.raises(ConfigError, match=r"digest of the shards .*train was \w+ and is \w+"):
        check_same_run(dataclasses.replace(state.stage, data=data), state, found, made / "hf")
