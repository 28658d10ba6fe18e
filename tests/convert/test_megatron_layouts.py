"""Long-VITA's Megatron layouts give the same weights as its Hugging Face format, at any number of ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vita import checkpoint
from megatron_vita.convert import cli, open_model
from tests.convert import publishers
from tests.convert.megatron_files import TEXT, Weights, write_layout, write_long_vita

pytest.importorskip("transformers")


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Long-VITA as published; ckpt: its import; tokenizer: its text model's."""
    root = tmp_path_factory.mktemp("published")
    convert("import", "--model", write_long_vita(root), "--output", root / "ckpt")
    publishers.write_tokenizer(root / "tokenizer")
    return root


def _beside(folder: Path, hf: Path) -> None:
    shutil.copy(hf / "config.json", folder / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("mindspeed", [False, True], ids=["MG", "MindSpeed"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (8, 1), (2, 2), (4, 2), (1, 2)])
def test_both_layouts_are_the_published_model(
    published: Path, tmp_path: Path, ranks: int, stages: int, mindspeed: bool
) -> None:
    write_layout(tmp_path / "mg", published / "hf", ranks=ranks, stages=stages, mindspeed=mindspeed)
    _beside(tmp_path / "mg", published / "hf")
    tokenizer = published / "tokenizer"
    convert("import", "--model", tmp_path / "mg", "--output", tmp_path / "ckpt", "--tokenizer", tokenizer)
    assert checkpoint.tensor_digests(tmp_path / "ckpt") == checkpoint.tensor_digests(published / "ckpt")
    state = checkpoint.read_state(tmp_path / "ckpt")
    assert state.stage.model == checkpoint.read_state(published / "ckpt").stage.model
    assert state.preprocess is not None
    assert state.preprocess.layout == "long_vita"
    added = json.loads((tmp_path / "ckpt/iter_0000000/tokenizer/tokenizer.json").read_text())["added_tokens"]
    assert {one["content"]: one["id"] for one in added}["<IMG_CONTEXT>"] == 261
    convert("verify", tmp_path / "mg", published / "hf")


@pytest.mark.parametrize("told_by", ["settings", "flag"])
def test_without_a_config_the_runs_settings_tell_the_shape(published: Path, tmp_path: Path, told_by: str) -> None:
    """Nothing of Megatron's padding is left: 512 rows in the files, 307 in the model. The account counts the rest."""
    write_layout(tmp_path / "mg", published / "hf", args={"vocab_size": 307 if told_by == "settings" else None})
    flags = ["--vocab-size", 307] if told_by == "flag" else []
    tokenizer = ["--tokenizer", published / "tokenizer"]
    convert("import", "--model", tmp_path / "mg", "--output", tmp_path / "ckpt", *tokenizer, *flags)
    state, wanted = (checkpoint.read_state(one).stage.model for one in (tmp_path / "ckpt", published / "ckpt"))
    assert state.vision is not None
    assert (state.vocab_size, state.norm_epsilon) == (307, wanted.norm_epsilon)
    assert state.vision.norm_epsilon == 1e-5  # Long-VITA's towers inherit it
    assert checkpoint.tensor_digests(tmp_path / "ckpt") == checkpoint.tensor_digests(published / "ckpt")
    report = json.loads((tmp_path / "ckpt/iter_0000000/conversion.json").read_text())
    padding = [name for name, why in report["left_out"].items() if why.endswith("pads the vocabulary")]
    assert padding == [
        f"mp_rank_01:{name}[51:]" for name in ("embedding.word_embeddings.weight", "output_layer.weight")
    ]
    stored = sum(path.stat().st_size for path in (tmp_path / "mg").rglob("*.pt"))
    assert 0.8 * stored < report["source"]["bytes"] <= stored
    assert report["source"]["used_bytes"] == report["target"]["bytes"]


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ([], False, "its embedding has 512 rows, and nothing says how many of them are Megatron's padding"),
        (["--vocab-size", 513], False, "a vocabulary of 513 was asked for, but its embedding has 512 rows"),
        (["--vocab-size", 306], True, "config.json says 307. Leave the flag out"),
    ],
)
def test_a_vocabulary_of_unknown_size_is_refused(
    flags: list[object], config: bool, message: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_layout(tmp_path / "mg", published / "hf")
    if config:
        _beside(tmp_path / "mg", published / "hf")
    tokenizer = ["--tokenizer", published / "tokenizer"]
    convert("import", "--model", tmp_path / "mg", "--output", tmp_path / "ckpt", *tokenizer, *flags, expect=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", [True, False], ids=["config", "settings"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("ranks", "stages"), [(8, 1), (4, 2)])
def test_a_decoder_alone_and_a_tied_head(
    published: Path, tmp_path: Path, ranks: int, stages: int, tied: bool, config: bool
) -> None:
    """The last of several stages has a copy of the embedding for its head."""
    llm = publishers.write_decoder(tmp_path / "llm", **TEXT, tie_word_embeddings=tied)
    write_layout(tmp_path / "mg", llm, ranks=ranks, stages=stages)
    if config:
        _beside(tmp_path / "mg", llm)
        convert("verify", tmp_path / "mg", llm)
    else:
        opened, wanted = open_model(tmp_path / "mg", vocab_size=307), open_model(llm)
        assert (opened.model, list(opened.tensors)) == (wanted.model, list(wanted.tensors))
        for name in opened.tensors:
            assert torch.equal(opened.tensors[name], wanted.tensors[name]), name


def _drop(name: str) -> Callable[[list[list[Weights]]], object]:
    return lambda weights: weights[0][1].pop(name)


def _poke(name: str, value: float) -> Callable[[list[list[Weights]]], object]:
    return lambda weights: weights[0][1][name].view(-1)[0].add_(value)


def _set(name: str, value: torch.Tensor) -> Callable[[list[list[Weights]]], object]:
    """On every rank of the first stage."""

    def change(weights: list[list[Weights]]) -> None:
        for one in weights[0]:
            assert name in one
            one[name] = value

    return change


def _laughs() -> Any:
    value: Any = ()
    for _ in range(100):
        value = (value, value)
    return value


NORM = "decoder.final_layernorm.weight"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing on one rank": ({"change": _drop("decoder.layers.1.mlp.linear_fc1.weight")}, "stands on 1 of 2 tensor"),
    "extra": ({"change": lambda w: [one.update(surprise=torch.zeros(2)) for one in w[0]]}, "mp_rank_00:surprise"),
    "misshapen": (
        {"change": lambda w: w[0][1].update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(96, 3)})},
        r"mp_rank_01:decoder.layers.0.mlp.linear_fc2.weight has shape \(96, 3\)",
    ),
    "copies that differ": ({"change": _poke(NORM, 0.5)}, "should be copies, but differ by 0.5"),
    "no weights": ({"change": lambda w: w[0][0].clear()}, "holds no weights under `model`"),
    "experts": ({"args": {"num_experts": 8}}, "num_experts=8"),
    "another norm": ({"args": {"normalization": "LayerNorm"}}, "normalization='LayerNorm'"),
    "another tower": ({"args": {"vision_model_type": "eva"}}, "vision_model_type='eva'"),
    "a setting that would take for ever to print": ({"args": {"num_experts": _laughs()}}, "num_experts='an object'"),
    "a name of two lines": (
        {"change": lambda w: w[0][0].update({"a\nerror: b": torch.zeros(1)})},
        r"'a\\nerror: b' under `model` is no tensor's name",
    ),
    "a tensor that is none": (
        {"change": lambda w: w[0][0].update({NORM: "text"})},
        f"{NORM} under `model` is no tensor",
    ),
    "layers without end": (
        {"args": {"num_layers": 2_000_000}},
        r"num_layers=2000000, but the folder holds \d+ tensors",
    ),
    "an embedding without columns": (
        {"change": _set("embedding.word_embeddings.weight", torch.tensor(1.0))},
        r"mp_rank_00:.*embedding.* has shape \(\), no rows of a vocabulary",
    ),
    "a tied head on one rank": (
        {"change": _drop("output_layer.weight"), "args": {"untie_embeddings_and_output_weights": False}},
        "the head stands on 1 ranks, the embedding that it is tied to on 2",
    ),
    "a tower of another kind": (
        {"change": _set("external_feature_model.vit.conv1.weight", torch.zeros(3))},
        r"the tower's conv1.weight has shape \(3,\), as no tower's has",
    ),
    "a tower without positions": (
        {"change": _set("external_feature_model.vit.position_embeddings.weight", torch.zeros(0, 4))},
        r"the tower's position_embeddings.weight has shape \(0, 4\), as no tower's has",
    ),
    "a projector without rows": (
        {"change": _set("external_feature_model.vision_projection.encoder.linear_fc1.weight", torch.tensor(1.0))},
        "vision_projection.encoder.linear_fc1.weight",
    ),
    "no rotary base": ({"args": {"rotary_base": None}}, "rotary_base must be a number"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(
    name: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = BAD[name]
    settings = {**settings, "args": {"vocab_size": 307, **settings.get("args", {})}}
    write_layout(tmp_path / "mg", published / "hf", **settings)
    flags = ["--output", tmp_path / "out", "--tokenizer", published / "tokenizer"]
    convert("import", "--model", tmp_path / "mg", *flags, expect=1)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_ranks_that_are_not_all_there_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = write_layout(tmp_path / "mg", published / "hf", ranks=4) / "iter_0000500"
    flags = ["--model", tmp_path / "mg", "--output", tmp_path / "out"]
    shutil.rmtree(step / "mp_rank_02")
    convert("import", *flags, expect=1)
    assert "pipeline rank 0, tensor rank 2 is missing" in capsys.readouterr().err
    (step / "mp_rank_03").rename(step / "mp_rank_03_000_001")
    convert("import", *flags, expect=1)
    assert "Expert parallelism" in capsys.readouterr().err


def test_copies_that_differ_by_rounding_are_told_and_the_first_is_taken(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_layout(tmp_path / "mg", published / "hf", change=_poke(NORM, 1e-3))
    opened = open_model(tmp_path / "mg", vocab_size=307)
    assert f"mp_rank_01:{NORM} differs from mp_rank_00:{NORM}" in caplog.text
    assert torch.equal(
        opened.tensors["language_model." + NORM], load_file(published / "hf/model.safetensors")["model.norm.weight"]
    )
