"""Recipes: what is accepted, what is rejected, and the messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.config import ModelConfig, ParallelConfig, StageConfig, load_run, to_dict
from megatron_vita.config.load import flag_names, stage_from_dict
from megatron_vita.errors import ConfigError

BASE = {
    "model": {"vocab_size": 100, "vision": {"num_layers": 2}},
    "data": {"data_path": "shards/a", "seq_length": 64},
    "checkpoint": {"save": "runs/x"},
}


def write(tmp_path: Path, recipe: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_stages_overlay_the_common_sections(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "optimizer": {"lr": "1e-3"}},
        {"name": "b", "model": {"vision": {"hidden_size": 64, "num_attention_heads": 4}}, "train": {"train_iters": 7}},
    ]
    run = load_run(write(tmp_path, {**BASE, "stages": stages}))
    first, second = run.stages
    assert first.optimizer.lr == 1e-3, "YAML reads 1e-3 as text; the loader must not"
    assert first.train.train_iters == 1
    assert second.train.train_iters == 7
    assert second.model.vision is not None
    assert second.model.vision.num_layers == 2, "an overlay keeps what it does not name"
    assert second.model.vision.hidden_size == 64


def test_flags_win_over_the_recipe_in_every_stage(tmp_path: Path) -> None:
    path = write(tmp_path, {**BASE, "stages": [{"name": "a"}, {"name": "b", "data": {"seq_length": 128}}]})
    flags = ["--seq-length", "256", "--vision-num-layers=3", "--bf16", "--train-iters", "5"]
    for stage in load_run(path, flags).stages:
        assert stage.data.seq_length == 256
        assert stage.model.vision is not None
        assert stage.model.vision.num_layers == 3
        assert stage.train.bf16
        assert stage.train.train_iters == 5


def test_flags_are_unique_and_carry_megatrons_names() -> None:
    flags = flag_names()
    assert flags["--tensor-model-parallel-size"] == "parallel.tensor_model_parallel_size"
    assert flags["--global-batch-size"] == "train.global_batch_size"
    assert len(set(flags.values())) == len(flags)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"modell": {}}, "Did you mean `model`"),
        ({"train": {"global_batchsize": 4}}, "Did you mean `global_batch_size`"),
        ({"model": {"vision": {"num_layer": 4}}}, "Did you mean `num_layers`"),
        ({"train": {"train_iters": "many"}}, "needs a value of type int"),
        ({"train": {"train_iters": 1.5}}, "needs a value of type int"),
        ({"train": {"bf16": "perhaps"}}, "needs a value of type bool"),
        ({"optimizer": {"lr": float("nan")}}, "needs a value of type float"),
        ({"optimizer": {"lr": 10**400}}, "needs a value of type float"),
        ({"model": {"num_layers": 10**400}}, "needs a value of type int"),
        ({"train": [1]}, "must be a mapping"),
        ({"stages": []}, "must be a list of mappings"),
        ({"data": {"layout": "other"}}, "choose one of internvl, long_vita"),
        ({"parallel": {"sequence_parallel": True}}, "needs parallel.tensor_model_parallel_size above 1"),
        ({"model": {"vision": {"image_size": 450}}}, "twice patch_size"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, recipe: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(write(tmp_path, recipe))


@pytest.mark.parametrize("content", ["a: [", "- 1", "just text"])
def test_files_that_are_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_run(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_run(tmp_path / "absent.yaml")


def test_unknown_flag_names_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--micro-batch-size"):
        load_run(write(tmp_path, BASE), ["--microbatch-size", "2"])


@pytest.mark.parametrize(
    ("overlay", "world", "message"),
    [
        (
            {"parallel": {"tensor_model_parallel_size": 3}},
            3,
            "heads=4 is not a multiple.*Use tensor_model_parallel_size 2.",
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 4}},
            4,
            "groups=2 is not a multiple.*tensor_model_parallel_size 2.",
        ),
        ({"parallel": {"context_parallel_size": 2}}, 3, r"Launch a multiple of 2 \(2 or 4\)"),
        ({"parallel": {"context_parallel_size": 4}}, 3, r"Launch a multiple of 4 \(4\)"),
        ({"parallel": {"pipeline_model_parallel_size": 3}}, 3, "num_layers=4"),
        ({"parallel": {"context_parallel_size": 6}}, 6, "Use 60 or 66, or context_parallel_size 4 or 8"),
        ({"train": {"global_batch_size": 3}}, 2, "global_batch_size=3 is not a multiple"),
        ({"model": {"max_position_embeddings": 32}}, 1, "exceeds model.max_position_embeddings=32"),
        ({"data": {"data_path": ""}}, 1, "data.data_path is not set"),
    ],
)
def test_layouts_that_cannot_work_are_rejected_before_any_group(
    tmp_path: Path, overlay: dict, world: int, message: str
) -> None:
    run = load_run(write(tmp_path, {**BASE, "stages": [{"name": "only", **overlay}]}))
    with pytest.raises(ConfigError, match=message):
        run.check(world)


def test_a_checkpoint_that_no_stage_would_read_is_rejected(tmp_path: Path) -> None:
    second = {"name": "b", "checkpoint": {"pretrained_checkpoint": "elsewhere"}}
    run = load_run(write(tmp_path, {**BASE, "stages": [{"name": "a"}, second]}))
    with pytest.raises(ConfigError, match=r"stage 'b': checkpoint.pretrained_checkpoint would not be read"):
        run.check(1)


def test_stage_names_must_differ(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, {**BASE, "stages": [{"name": "a"}, {"name": "a"}]}))
    with pytest.raises(ConfigError, match="not all different"):
        run.check(1)


@given(
    tp=st.sampled_from([1, 2]),
    layers=st.integers(1, 9),
    lr=st.floats(1e-7, 1e-1),
    reset=st.booleans(),
)
def test_a_stage_survives_the_way_through_json(tp: int, layers: int, lr: float, reset: bool) -> None:
    from megatron_vita.config import DataConfig, OptimizerConfig

    stage = StageConfig(
        model=ModelConfig(num_layers=layers, vocab_size=5),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1),
        optimizer=OptimizerConfig(lr=lr),
        data=DataConfig(reset_per_document=reset),
    )
    assert stage_from_dict(to_dict(stage), "test") == stage


def test_environment_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**BASE, "data": {"data_path": "${VITA_TEST_SHARDS}/a", "tokenizer_model": "${VITA_TEST_UNSET:-tok}"}}
    path = write(tmp_path, recipe)
    monkeypatch.delenv("VITA_TEST_SHARDS", raising=False)
    with pytest.raises(ConfigError, match="VITA_TEST_SHARDS"):
        load_run(path)
    monkeypatch.setenv("VITA_TEST_SHARDS", "/data")
    data = load_run(path).stages[0].data
    assert (data.data_path, data.tokenizer_model) == ("/data/a", "tok")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-attention-heads 0", "model.num_attention_heads=0 must be at least 1"),
        ("--num-query-groups 0", "model.num_query_groups=0 must be at least 1"),
        ("--num-layers 0", "model.num_layers=0"),
        ("--make-vocab-size-divisible-by 0", "model.make_vocab_size_divisible_by=0"),
        ("--kv-channels 7", "heads are 7 wide"),
        ("--norm-epsilon 0", "model.norm_epsilon=0.0 must be above 0"),
        ("--vision-patch-size 0", "model.vision.patch_size=0"),
        ("--vision-num-attention-heads 0", "model.vision.num_attention_heads=0"),
        ("--projector-ffn-hidden-size 0", "model.projector.ffn_hidden_size=0"),
        ("--eval-iters 0", "train.eval_iters=0"),
        ("--eval-interval -1", "train.eval_interval=-1"),
        ("--seed -1", "train.seed=-1"),
        ("--save-interval -1", "checkpoint.save_interval=-1"),
        ("--keep-last -1", "checkpoint.keep_last=-1"),
        ("--keep-every -1", "checkpoint.keep_every=-1"),
        ("--on-damage ignore", "checkpoint.on_damage='ignore': choose fallback or fail"),
        ("--max-failed-samples -1", "data.max_failed_samples=-1"),
        ("--weight-decay -1", "optimizer.weight_decay=-1"),
        ("--adam-beta1 1", "optimizer.adam_beta1=1.0 must be below 1"),
        ("--adam-eps 0", "optimizer.adam_eps=0.0 must be above 0"),
        ("--clip-grad -1", "optimizer.clip_grad=-1"),
        ("--lr inf", "optimizer.lr: needs a value of type float, got 'inf'"),
        ("--recompute-num-layers 2", "do nothing without recompute_granularity=full"),
        ("--recompute-granularity selective --recompute-method block", "do nothing without"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers -1", "recompute_num_layers=-1"),
    ],
)
def test_numbers_out_of_range_are_rejected_and_say_where(tmp_path: Path, flags: str, message: str) -> None:
    recipe = write(tmp_path, BASE)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(recipe, flags.split())
    assert str(caught.value).startswith(f"{recipe}, stage 1: ")
