"""Long-VITA's Megatron layouts give the same weights as its Hugging Face format, at any number of ranks."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vita import checkpoint
from megatron_vita.convert import cli, open_model
from tests.convert import publishers

pytest.importorskip("transformers")

VISION = {"hidden_size": 64, "num_attention_heads": 16}
Weights = dict[str, torch.Tensor]


def convert(*arguments: object, expect: int = 0) -> None:
    assert cli.main([str(one) for one in arguments]) == expect


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Long-VITA as published, written here without the package; ckpt: its import; tokenizer: its text model's."""
    root = tmp_path_factory.mktemp("published")
    llm = publishers.write_decoder(root / "llm", num_attention_heads=12, num_key_value_heads=4)
    vit = publishers.write_intern_vit(root / "vit", remote=True, **VISION)
    tensors = dict(load_file(llm / "model.safetensors"))
    tensors.update({"model.vision_model." + name: one for name, one in publishers.tensors_of(vit).items()})
    generator = torch.Generator().manual_seed(5)
    for name, shape in (
        ("pre_proj_layernorm.weight", (256,)),
        ("pre_proj_layernorm.bias", (256,)),
        ("mlp.0.weight", (64, 256)),
        ("mlp.2.weight", (72, 64)),
    ):
        tensors["model.vision_projection." + name] = torch.randn(shape, generator=generator)
    folder = root / "hf"
    publishers.write_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((llm / "config.json").read_text())
    config.update(model_type="long_vita", visual=json.loads((vit / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    convert("import", "--model", folder, "--output", root / "ckpt")
    publishers.write_tokenizer(root / "tokenizer")
    return root


def _layers(count: int, stages: int) -> Iterator[tuple[int, int, int]]:
    """(layer, its stage, its number there)."""
    for layer in range(count):
        yield layer, layer * stages // count, layer % (count // stages)


def _in_ranks(hf: Weights, config: dict[str, Any], ranks: int, stages: int, mindspeed: bool) -> list[list[Weights]]:
    """[stage][rank] of Megatron's names, cut by the textbook."""
    out: list[list[Weights]] = [[{} for _ in range(ranks)] for _ in range(stages)]

    def put(stage: int, name: str, parts: list[torch.Tensor]) -> None:
        for rank, part in enumerate(parts):
            out[stage][rank][name] = part.contiguous().clone()

    def cut(one: torch.Tensor, axis: int) -> list[torch.Tensor]:
        return list(one.chunk(ranks, axis))

    norms = ("input_layernorm.", "pre_mlp_layernorm.") if mindspeed else (
        "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")  # fmt: skip
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    size = config["hidden_size"] // heads
    put(0, "embedding.word_embeddings.weight", _padded_rows(hf["model.embed_tokens.weight"], ranks))
    put(0, "unused", [torch.zeros(3)] * ranks)
    for layer, stage, number in _layers(config["num_hidden_layers"], stages):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{number}."
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{old}self_attn.{one}_proj.{kind}"].unflatten(0, (groups, -1)) for one in "qkv")
            put(stage, f"{new}self_attention.linear_qkv.{kind}", cut(torch.cat([q, k, v], 1).flatten(0, 1), 0))
            assert q.shape[1] == heads // groups * size
        put(stage, new + "self_attention.linear_proj.weight", cut(hf[old + "self_attn.o_proj.weight"], 1))
        gate, up = (cut(hf[f"{old}mlp.{one}_proj.weight"], 0) for one in ("gate", "up"))
        put(stage, new + "mlp.linear_fc1.weight", [torch.cat(both) for both in zip(gate, up, strict=True)])
        put(stage, new + "mlp.linear_fc2.weight", cut(hf[old + "mlp.down_proj.weight"], 1))
        put(stage, f"{new}{norms[0]}weight", [hf[old + "input_layernorm.weight"]] * ranks)
        put(stage, f"{new}{norms[1]}weight", [hf[old + "post_attention_layernorm.weight"]] * ranks)
        for rank in range(ranks):
            out[stage][rank][new + "self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")  # type: ignore[assignment]
    put(stages - 1, "decoder.final_layernorm.weight", [hf["model.norm.weight"]] * ranks)
    put(stages - 1, "output_layer.weight", _padded_rows(hf["lm_head.weight"], ranks))
    for name, parts in _tower_in_ranks(hf, config["visual"], ranks):
        put(0, "external_feature_model." + name, parts)
    return out


def _padded_rows(one: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Megatron pads the vocabulary with rows that hold anything."""
    rows = 8 * ranks * math.ceil(len(one) / (8 * ranks))
    return list(torch.cat([one, torch.full((rows - len(one), one.shape[1]), 7.0)]).chunk(ranks))


def _tower_in_ranks(hf: Weights, visual: dict[str, Any], ranks: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    old, heads = "model.vision_model.", visual["num_attention_heads"]
    yield "vit.class_token", [hf[old + "embeddings.class_embedding"]] * ranks
    yield "vit.position_embeddings.weight", [hf[old + "embeddings.position_embedding"][0]] * ranks
    for kind in ("weight", "bias"):
        yield f"vit.conv1.{kind}", [hf[f"{old}embeddings.patch_embedding.{kind}"]] * ranks
        projection = hf[f"model.vision_projection.pre_proj_layernorm.{kind}"]
        yield f"pre_proj_layernorm.{kind}", [projection] * ranks
        for layer in range(visual["num_hidden_layers"]):
            at, new = f"{old}encoder.layers.{layer}.", f"vit.decoder.layers.{layer}."
            joint = hf[f"{at}attn.qkv.{kind}"].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
            yield f"{new}self_attention.linear_qkv.{kind}", list(joint.chunk(ranks))
            yield f"{new}mlp.linear_fc1.{kind}", list(hf[f"{at}mlp.fc1.{kind}"].chunk(ranks))
            for one, two in (("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc2", "mlp.fc2")):
                whole = hf[f"{at}{two}.{kind}"]
                yield f"{new}{one}.{kind}", list(whole.chunk(ranks, 1)) if kind == "weight" else [whole] * ranks
            for one, two in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2")):
                yield f"{new}{one}.{kind}", [hf[f"{at}{two}.{kind}"]] * ranks
            if kind == "weight":
                yield new + "ls1", [hf[at + "ls1"]] * ranks
                yield new + "ls2", [hf[at + "ls2"]] * ranks
    yield "vision_projection.encoder.linear_fc1.weight", list(hf["model.vision_projection.mlp.0.weight"].chunk(ranks))
    yield (
        "vision_projection.encoder.linear_fc2.weight",
        list(hf["model.vision_projection.mlp.2.weight"].chunk(ranks, 1)),
    )


def write_layout(
    folder: Path,
    hf: Path,
    *,
    ranks: int = 2,
    stages: int = 1,
    mindspeed: bool = False,
    change: Callable[[list[list[Weights]]], object] = lambda weights: None,
    args: dict[str, Any] | None = None,
) -> Path:
    """A published folder of either layout, at step 500."""
    config = json.loads((hf / "config.json").read_text())
    weights = _in_ranks(load_file(hf / "model.safetensors"), config, ranks, stages, mindspeed)
    change(weights)
    settings = argparse.Namespace(
        num_layers=2,
        hidden_size=72,
        ffn_hidden_size=104,
        num_attention_heads=12,
        num_query_groups=4,
        group_query_attention=True,
        norm_epsilon=1e-5,
        rotary_base=1000000,
        max_position_embeddings=512,
        untie_embeddings_and_output_weights=True,
        vision_model_type="intern_300m",
        swiglu=True,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    vars(settings).update(args or {})
    (folder / "iter_0000500").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("500")
    for stage, row in enumerate(weights):
        for rank, one in enumerate(row):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            path = folder / "iter_0000500" / name / "model_optim_rng.pt"
            path.parent.mkdir()
            rng = [{"python": (3, (1, 2), None), "torch": torch.get_rng_state()}]
            content = {"args": settings, "checkpoint_version": 3.0, "iteration": 500, "model": one, "rng_state": rng}
            torch.save(content, path)
            if mindspeed:
                _as_an_ascend_saves(path)
    return folder


def _as_an_ascend_saves(path: Path) -> None:
    """Other words for the call that makes a tensor, and for the device."""
    with zipfile.ZipFile(path) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            call = b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
            archive.writestr(name, content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", call))


def _beside(folder: Path, hf: Path) -> None:
    shutil.copy(hf / "config.json", folder / "config.json")


@pytest.mark.parametrize("mindspeed", [False, True], ids=["MG", "MindSpeed"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)])
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


def test_without_a_config_the_runs_settings_tell_the_shape(published: Path, tmp_path: Path) -> None:
    """All rows of the embedding are kept then: nothing says which are padding."""
    write_layout(tmp_path / "mg", published / "hf")
    opened = open_model(tmp_path / "mg")
    wanted = checkpoint.read_state(published / "ckpt").stage.model
    assert opened.model.vision is not None
    assert wanted.vision is not None
    assert opened.model.vocab_size == 320
    assert opened.model.norm_epsilon == wanted.norm_epsilon
    assert opened.model.vision.norm_epsilon == 1e-5  # Long-VITA's towers inherit it
    tensors = checkpoint.read_tensors(published / "ckpt")
    for name in opened.tensors:
        rows = tensors.shape(name)[0]
        assert torch.equal(opened.tensors[name][:rows], tensors[name]), name
    convert("import", "--model", tmp_path / "mg", "--output", tmp_path / "ckpt", expect=1)  # no tokenizer


def _drop(name: str) -> Callable[[list[list[Weights]]], object]:
    return lambda weights: weights[0][1].pop(name)


def _poke(name: str, value: float) -> Callable[[list[list[Weights]]], object]:
    return lambda weights: weights[0][1][name].view(-1)[0].add_(value)


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
        {"change": lambda w: w[0][1].update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(72, 3)})},
        r"mp_rank_01:decoder.layers.0.mlp.linear_fc2.weight has shape \(72, 3\)",
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
    "no rotary base": ({"args": {"rotary_base": None}}, "rotary_base must be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(
    name: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = BAD[name]
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
    opened = open_model(tmp_path / "mg")
    assert f"mp_rank_01:{NORM} differs from mp_rank_00:{NORM}" in caplog.text
    assert torch.equal(
        opened.tensors["language_model." + NORM], load_file(published / "hf/model.safetensors")["model.norm.weight"]
    )
