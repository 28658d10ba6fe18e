"""Folders that are not what they say, and outputs that must not be touched: refused by name, with nothing written."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vita import checkpoint
from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.convert import cli, rules
from megatron_vita.convert.views import McoreView
from megatron_vita.errors import CheckpointError
from tests.convert import publishers

pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    publishers.write_qwen2(root / "llm")
    publishers.write_intern_vit(root / "vit", remote=True)
    assert cli.main(["import", "--llm", str(root / "llm"), "--output", str(root / "ckpt")]) == 0
    return root


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) - 100])


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _shards(weight_map: Callable[[list[str]], dict[str, str]], files: dict[str, slice]) -> Callable[[Path], None]:
    """Split the weights into files, with an index of one's own making."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        for file, part in files.items():
            save_file({name: tensors[name] for name in names[part]}, folder / file)
        index = {"metadata": {}, "weight_map": weight_map(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def _stale_index(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _quantised(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / WEIGHTS)


def _odd_types(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
BAD = {
    "missing tensor": (_tensors(lambda t: t.pop(Q)), f"{Q} \\(72, 72\\) is missing"),
    "extra tensor": (_tensors(lambda t: t.update({"model.surprise": torch.zeros(2)})), r"model.surprise \(2,\)"),
    "misshapen": (_tensors(lambda t: t.update({Q: t[Q][:-1].clone()})), r"q_proj.weight has shape \(71, 72\)"),
    "mixed types": (_tensors(_odd_types), "gate_proj.*up_proj.*different types"),
    "truncated": (_truncate, "model.safetensors: damaged, truncated or .*not fully covered"),
    "no header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 20), "model.safetensors: damaged, truncated"),
    "pickled": (_pickled, "pickled weights .*pytorch_model.bin.*safetensors revision"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
    "index leaves the folder": (
        _shards(lambda names: dict.fromkeys(names, "../secret.safetensors"), {A: slice(None)}),
        r"points to '../secret.safetensors'",
    ),
    "index names a missing file": (_shards(lambda names: dict.fromkeys(names, B), {A: slice(None)}), f"names {B}"),
    "duplicate": (
        _shards(
            lambda names: {**dict.fromkeys(names[:5], A), **dict.fromkeys(names[5:], B)},
            {A: slice(6), B: slice(5, None)},
        ),
        r"which the index expects in model-00002|lies in both",
    ),
    "index promises more": (
        _shards(lambda names: {**dict.fromkeys(names, A), "model.ghost": A}, {A: slice(None)}),
        "names model.ghost",
    ),
    "two sets of weights": (_stale_index, "both model.safetensors and an index"),
    "quantised": (_quantised, "model.norm.weight has type F8_E4M3"),
    "quantisation config": (_config(quantization_config={"bits": 4}), "quantization_config"),
    "sliding window": (_config(use_sliding_window=True), "use_sliding_window"),
    "window in some layers": (_config(layer_types=["full_attention", "sliding_attention"]), "layer_types='sliding"),
    "experts": (_config(model_type="qwen3_moe", num_experts=8), "num_experts=8.*mixture of experts"),
    "two rope scalings": (
        _config(rope_scaling={"type": "yarn", "factor": 4.0}),
        r"rotary scaling \(position_embedding_type\) differently \(rope_parameters None, rope_scaling yarn\)",
    ),
    "rope scaling by length": (
        _config(rope_scaling={"type": "longrope", "factor": 4.0}, rope_parameters=...),
        "rope_scaling='longrope' is not supported",
    ),
    "half a llama3 scaling": (
        _config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}),
        "rope_scaling.high_freq_factor must be a number above 0, got None",
    ),
    "part of each head": (_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "Qwen3 with biases": (_config(model_type="qwen3", attention_bias=True), "attention_bias=True"),
    "Llama with biases": (_config(model_type="llama"), "holds model.layers.0.self_attn.k_proj.bias"),
    "no rope base": (_config(rope_theta=..., rope_parameters=...), "names no rope_theta"),
    "missing number": (_config(num_hidden_layers=...), "num_hidden_layers must be a whole number"),
    "indivisible heads": (_config(num_key_value_heads=4), "num_query_groups=4"),
    "unknown family": (_config(model_type="mamba"), "model_type='mamba'"),
    "tied in the config only": (_config(tie_word_embeddings=True), "lm_head.weight differs"),
    "a kind that is a list": (_config(model_type=[]), r"config.json: model_type must be a string, got \[\]"),
    "a kind that is an object": (_config(model_type={}), r"config.json: model_type must be a string, got \{\}"),
    "layers that are a number": (_config(layer_types=5), "config.json: layer_types must be a list of strings, got 5"),
    "a value that would fill the screen": (
        _config(hidden_act=[[[["x" * 1000] * 99] * 99]]),
        r"config.json: hidden_act=.{,200} is not supported \('silu' only\)",
    ),
    "a base that is a list": (_config(rope_theta=[5]), r"config.json: rope_theta must be a number .*, got \[5\]"),
    "a base for each kind of layer": (
        _config(rope_theta=1e6, rope_parameters={"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}),
        "rope_parameters.full_attention=.*one rotary embedding for all layers",
    ),
    "no number as epsilon": (_config(rms_norm_eps=float("nan")), "rms_norm_eps must be a number above 0, got nan"),
    "an epsilon without end": (_config(rms_norm_eps=10**400), "rms_norm_eps must be a number above 0, got 1000"),
    "a word for a truth": (_config(tie_word_embeddings="false"), "tie_word_embeddings must be true or false, got 'fal"),
    "no layers": (_config(num_hidden_layers=-1), "num_hidden_layers must be a whole number from 1 to"),
    "layers without end": (
        _config(num_hidden_layers=2_000_000, layer_types=...),
        "num_hidden_layers=2000000, but the folder holds 27 tensors",
    ),
    "heads without end": (_config(num_attention_heads=1 << 30), "num_attention_heads must be a whole number from 1 to"),
    "integers as weights": (_tensors(lambda t: t.update({Q: t[Q].long()})), f"{Q} has type int64, .* floating"),
    "bytes as weights": (_tensors(lambda t: t.update({Q: t[Q].byte()})), f"{Q} has type uint8, .*dequantised first"),
    "nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        "config.json: not readable JSON .*nested",
    ),
    "a setting twice": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("{", '{"hidden_size": 144,', 1)
        ),
        "config.json: not readable JSON .*'hidden_size' stands in it twice",
    ),
    "an index nested without end": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 200_000),
        "index.json: not readable JSON .*nested",
    ),
    "an index that names a tensor twice": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"{Q}": "{WEIGHTS}", "{Q}": "{WEIGHTS}"}}}}'
        ),
        f"index.json: not readable JSON .*'{Q}' stands in it twice",
    ),
    "an index of objects": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": {}}}'),
        r"index.json: weight_map: a must be a string, got \{\}",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}'),
        "index.json: weight_map must be an object, got 5",
    ),
    "broken JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
}


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrite a file's header, its data as they are."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        changed = change(header)
        text = changed if isinstance(changed, str) else json.dumps(header)
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[end:])

    return apply


def _swap(header: dict[str, Any], key: str, value: object) -> None:
    header[Q][key] = value


BAD_HEADERS = {
    "overlap": (lambda h: _swap(h, "data_offsets", h[K]["data_offsets"]), "invalid offset for tensor"),
    "same bytes twice": (
        lambda h: (_swap(h, "data_offsets", h[K]["data_offsets"]), _swap(h, "shape", h[K]["shape"]))[0],
        "invalid offset for tensor",
    ),
    "out of range": (lambda h: _swap(h, "data_offsets", [10**12, 10**12 + 72 * 72 * 4]), "invalid offset for tensor"),
    "backwards": (lambda h: _swap(h, "data_offsets", h[Q]["data_offsets"][::-1]), "invalid offset for tensor"),
    "negative": (lambda h: _swap(h, "data_offsets", [-8, 8]), "invalid value: integer `-8`"),
    "huge": (lambda h: _swap(h, "shape", [1 << 62, 1 << 62]), "overflow computing buffer size"),
    "beyond 64 bits": (lambda h: _swap(h, "shape", [1 << 70]), "invalid type: floating"),
    "fractions": (lambda h: _swap(h, "shape", [72.0, 72]), "invalid type: floating point `72.0`"),
    "truth as a size": (lambda h: _swap(h, "shape", [True, 72]), "invalid type: boolean `true`"),
    "three offsets": (lambda h: _swap(h, "data_offsets", [0, 1, 2]), "trailing characters|invalid length|expected"),
    "no offsets": (lambda h: h[Q].pop("data_offsets"), "missing field `data_offsets`"),
    "a list": (lambda h: "[1, 2]", "invalid type: "),
    "a name twice": (lambda h: json.dumps(h)[:-1] + f', "{Q}": {json.dumps(h[Q])}}}', "stands in it twice"),
    "nested without end": (lambda h: "[" * 200_000, "model.safetensors: damaged"),
    "bytes that belong to none": (lambda h: h.pop(Q), "invalid offset for tensor|not fully covered"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BAD_HEADERS[name]
    shutil.copytree(good / "llm", tmp_path / "llm")
    _header(change)(tmp_path / "llm")
    assert cli.main(["import", "--llm", str(tmp_path / "llm"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert str(tmp_path / "llm" / WEIGHTS) in error
    assert not (tmp_path / "out").exists()


def test_an_absurd_header_length_is_not_read(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "llm", tmp_path / "llm")
    content = (tmp_path / "llm" / WEIGHTS).read_bytes()
    (tmp_path / "llm" / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    assert cli.main(["import", "--llm", str(tmp_path / "llm"), "--output", str(tmp_path / "out")]) == 1
    assert "truncated or no safetensors file ('header too large')" in capsys.readouterr().err


def test_a_folder_of_the_wrong_kind_is_a_usage_error(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, vit, ckpt = (str(good / name) for name in ("llm", "vit", "ckpt"))
    publishers.write_tower(tmp_path / "clip", "CLIP")
    (tmp_path / "empty").mkdir()
    cache = tmp_path / "models--a--b"
    for name in ("snapshots", "refs"):
        (cache / name).mkdir(parents=True)
    (cache / "refs/main").write_text("0123abc")
    for name in ("0123abc", "ffff"):
        (cache / "snapshots" / name).symlink_to(good / "llm")
    empty, nothing = str(tmp_path / "empty"), str(tmp_path / "nothing")
    tower = "is a vision tower .*Give it as --vision"
    for arguments, message in (
        (["import", "--llm", llm, "--vision", llm], r"is a decoder \(qwen2\).*Give it as --llm"),
        (["import", "--llm", vit], rf"vit: {tower}"),
        (["import", "--model", vit], rf"vit: {tower}"),
        (["import", "--llm", str(tmp_path / "clip")], rf"clip: {tower}"),
        (["import", "--llm", ckpt], "is a checkpoint already. Give a Hugging Face folder"),
        (["import", "--llm", llm, "--vision", ckpt], "ckpt: is a checkpoint"),
        (["import", "--llm", llm, "--vision", nothing], "nothing: no such folder"),
        (["import", "--llm", llm, "--vision", empty], "empty: .*no config.json"),
        (["import", "--llm", nothing, "--vision", vit], "nothing: no such folder"),
        (["import", "--llm", str(cache)], "is a cache of downloads. Give .*models--a--b/snapshots/0123abc"),
        (["import", "--llm", llm, "--vision", str(cache)], "is a cache of downloads. Give .*snapshots/0123abc"),
    ):
        assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 2, arguments
        error = capsys.readouterr().err
        assert re.search(message, error), error
    assert cli.main(["verify", llm, empty]) == 2
    assert "neither a finished checkpoint nor" in capsys.readouterr().err


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_quantised_model_is_refused_wherever_it_says_so(
    part: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publishers.write_internvl(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (config if part is None else config[part])["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert cli.main(["import", "--model", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]) == 1
    assert re.search(f"{part or ''}: quantization_config=.*dequantise", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["InternViT, remote names", *publishers.TOWERS])
def test_towers_are_compared_with_each_other(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = tmp_path / "tower"
    if name in publishers.TOWERS:
        publishers.write_tower(tower, name)
    else:
        shutil.copytree(good / "vit", tower)
    assert cli.main(["verify", str(tower), str(tower)]) == 0
    assert re.match(r"equal: [1-9]\d* tensors, 0 differ", capsys.readouterr().out)
    shutil.copytree(tower, tmp_path / "other")
    _tensors(lambda t: t[next(one for one in t if "fc1.weight" in one)].add_(1.0))(tmp_path / "other")
    assert cli.main(["verify", str(tower), str(tmp_path / "other")]) == 1
    assert "vision_model.decoder.layers.0.mlp.linear_fc1.weight: max difference 1" in capsys.readouterr().out
    assert cli.main(["verify", str(tower), str(tower), "--logits"]) == 2
    assert "is a vision tower" in capsys.readouterr().err


def test_verify_compares_tokenizers(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "llm", tmp_path / "other")
    assert cli.main(["verify", str(good / "ckpt"), str(tmp_path / "other")]) == 0
    publishers.write_tokenizer(tmp_path / "other", extra=("<new>",))
    assert cli.main(["verify", str(good / "ckpt"), str(tmp_path / "other")]) == 1
    assert "tokenizers differ: '<new>' is missing and 259" in capsys.readouterr().out


def test_no_row_of_the_vocabulary_is_padding_unless_asked(good: Path, tmp_path: Path) -> None:
    export = ["export", "--checkpoint", str(good / "ckpt"), "--format", "llm", "--output"]
    assert cli.main([*export, str(tmp_path / "plain")]) == 0
    assert cli.main([*export, str(tmp_path / "padded"), "--make-vocab-size-divisible-by", "64"]) == 0
    plain, padded = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "padded"))
    assert plain["lm_head.weight"].shape[0] == publishers.VOCAB
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert padded[name].shape[0] == 320
        assert torch.equal(padded[name][: publishers.VOCAB], plain[name])
        assert not padded[name][publishers.VOCAB :].any()
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] == 320


@pytest.mark.parametrize("name", BAD)
def test_bad_decoder(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD[name]
    shutil.copytree(good / "llm", tmp_path / "llm")
    spoil(tmp_path / "llm")
    assert cli.main(["import", "--llm", str(tmp_path / "llm"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert str(tmp_path / "llm") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_normalization": True}, "attn.q_norm.weight (60,) is missing"),
        ({"norm_type": "rms_norm"}, "norm1.bias (60,)"),
        ({"norm_type": "batch_norm"}, "norm_type='batch_norm'"),
        ({"qkv_bias": False}, "holds encoder.layers.0.attn.qkv.bias"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"image_size": [16, 32]}, "image_size must be one side"),
        ({"patch_size": 5}, "patch_size"),
        (
            {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
            "position_embedding.weight (16, 60) is missing",
        ),
        ({"model_type": "clip_vision_model"}, "hidden_act='gelu' is not supported ('quick_gelu' only)"),
        ({"model_type": "eva"}, "model_type='eva'"),
        ({"model_type": []}, "model_type must be a string, got []"),
        ({"norm_type": []}, "norm_type must be a string, got []"),
        ({"qkv_bias": "yes"}, "qkv_bias must be true or false, got 'yes'"),
        ({"image_size": [16, 16, 16]}, "image_size must be one side of a square, got [16, 16, 16]"),
        ({"num_hidden_layers": 2_000_000}, "num_hidden_layers=2000000, but the folder holds"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config='...' is not supported"),
    ],
)
def test_bad_tower(
    change: dict[str, Any], message: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good / "vit", tmp_path / "vit")
    _config(**change)(tmp_path / "vit")
    output = tmp_path / "out"
    flags = ["--llm", str(good / "llm"), "--vision", str(tmp_path / "vit"), "--output", str(output)]
    assert cli.main(["import", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_usage_errors_are_status_2(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm, out = str(good / "llm"), str(tmp_path / "out")
    for arguments in (
        ["import", "--output", out],
        ["import", "--llm", llm, "--model", llm, "--output", out],
        ["import", "--model", llm, "--vision", llm, "--output", out],
        ["import", "--llm", llm, "--output", str(good / "ckpt")],  # exists
        ["import", "--model", str(good / "ckpt"), "--output", out],
        ["import", "--llm", out, "--output", out],
        ["export", "--checkpoint", out, "--output", out, "--format", "llm"],
        ["export", "--checkpoint", str(good / "ckpt"), "--output", "/dev/null/x", "--format", "llm"],
        ["export", "--checkpoint", str(good / "ckpt"), "--output", out, "--format", "llm", "--max-shard-gb", "0"],
        ["export", "--checkpoint", str(good / "ckpt"), "--output", out, "--format", "llm", "--max-shard-gb", "inf"],
        ["export", "--checkpoint", str(good / "ckpt"), "--output", out, "--format", "llm", "--max-shard-gb", "nan"],
        ["verify", llm, out],
    ):
        assert cli.main(arguments) == 2, arguments
        assert capsys.readouterr().err.startswith("error: ")
    for arguments in (
        ["export", "--checkpoint", llm, "--output", out, "--format", "gguf"],
        ["import", "--llm", llm, "--output", out, "--seed", "99999999999999999999"],
        ["import", "--llm", llm, "--output", out, "--seed", "-1"],
        ["verify", llm, llm, "--tolerance", "nan"],
        ["verify", llm, llm, "--tolerance", "-1"],
        ["verify", llm, llm, "--show", "-1"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2, arguments
    assert not (tmp_path / "out").exists()


def test_an_output_is_replaced_as_a_whole_or_left_alone(good: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    export = ["export", "--checkpoint", str(good / "ckpt"), "--output", str(output), "--format", "llm"]
    assert cli.main([*export, "--max-shard-gb", "0.0001"]) == 0
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert cli.main(export) == 2
    assert cli.main([*export, "--overwrite"]) == 0
    assert [path.name for path in output.glob("model*")] == [WEIGHTS]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("mine")
    export[4] = str(notes)
    assert cli.main([*export, "--overwrite"]) == 2
    assert (notes / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_publishes_nothing(
    command: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses what goes beyond a limit, as a full disk does."""
    arguments = {
        "import": ["import", "--llm", str(good / "llm")],
        "export": ["export", "--checkpoint", str(good / "ckpt"), "--format", "llm"],
    }[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        status = cli.main([*arguments, "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    error = capsys.readouterr().err
    assert "File too large" in error
    assert "Make room" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_what_the_disk_cannot_hold_is_not_begun(
    command: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    arguments = {
        "import": ["import", "--llm", str(good / "llm")],
        "export": ["export", "--checkpoint", str(good / "ckpt"), "--format", "llm"],
    }[command]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert re.search(r"has 1 KB free, [0-9.]+ KB are needed. Nothing was written. Make room", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_a_flipped_bit_in_any_file_is_found(
    kind: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify` of one folder names the file; and what a damaged checkpoint holds beside its weights goes nowhere."""
    copy, export = tmp_path / "copy", ["--format", "llm", "--output", str(tmp_path / "hf")]
    if kind == "checkpoint":
        shutil.copytree(good / "ckpt/iter_0000000", copy / "iter_0000000")
        names = {"run.json", "conversion.json", "tokenizer/tokenizer.json", ".metadata", "integrity.json"}
    else:
        assert cli.main(["export", "--checkpoint", str(good / "ckpt"), "--format", "llm", "--output", str(copy)]) == 0
        names = {"config.json", "tokenizer.json", "conversion.json", WEIGHTS, "README.md"}
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert len(files) > len(names)
    capsys.readouterr()
    assert cli.main(["verify", str(copy)]) == 0
    found = re.fullmatch(r"verified: (\d+) files, (\d+) bytes .*", capsys.readouterr().out.strip())
    assert found is not None
    assert int(found[1]) == len(files) - 1  # the one with the digests
    for path in files:
        content = path.read_bytes()
        _flip(path)
        assert cli.main(["verify", str(copy)]) == 1, path
        assert (path.name if path.name != "XXH128SUMS" else str(copy)) in capsys.readouterr().err
        if kind == "checkpoint":
            assert cli.main(["export", "--checkpoint", str(copy), *export]) == 1, path
            assert path.name in capsys.readouterr().err
            assert not (tmp_path / "hf").exists()
        path.write_bytes(content)
    (copy / "lost").write_text("")  # no conversion wrote it, and it is nobody's
    assert cli.main(["verify", str(copy)]) == 0
    files[0].unlink()
    assert cli.main(["verify", str(copy)]) != 0
    assert str(copy) in capsys.readouterr().err


def test_verify_of_one_folder_wants_digests(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for flags, status, says in (
        ([str(good / "llm")], 2, "llm: has no XXH128SUMS to check its files against"),
        ([str(tmp_path / "nothing")], 2, "nothing: no such folder"),
        ([str(tmp_path / "empty")], 1, "empty: holds no finished checkpoint"),
        ([str(good / "ckpt"), "--logits"], 2, "Name a second one"),
    ):
        assert cli.main(["verify", *flags]) == status
        assert says in capsys.readouterr().err
    (tmp_path / "empty/XXH128SUMS").write_text("00  ../../secret\n")
    assert cli.main(["verify", str(tmp_path / "empty")]) == 1
    assert "XXH128SUMS: damaged, or names what lies outside" in capsys.readouterr().err


def test_changed_settings_of_a_checkpoint_are_found(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged digit of run.json gives another model, not always one that the weights do not fit."""
    shutil.copytree(good / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt/iter_0000000/run.json"
    text = path.read_text()
    changed = re.sub(r'"rotary_base": 1', '"rotary_base": 9', text)
    assert changed != text
    path.write_text(changed)
    flags = ["--checkpoint", str(tmp_path / "ckpt"), "--output", str(tmp_path / "hf"), "--format", "llm"]
    assert cli.main(["export", *flags]) == 1
    assert "run.json: its content has changed since it was written" in capsys.readouterr().err


def test_verify_sees_what_logits_cannot(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "language_model.decoder.layers.0.self_attention.linear_qkv.bias"
    tensors = checkpoint.read_tensors(good / "ckpt")
    changed = {key: tensors[key].clone() for key in tensors}
    changed[name][3 * 12 + 1] += 0.5  # a key bias moves all scores of a query alike
    state = checkpoint.read_state(good / "ckpt")
    other = checkpoint.write_tensors(tmp_path / "ckpt", 0, changed, state, good / "ckpt/iter_0000000/tokenizer")
    assert cli.main(["verify", str(good / "llm"), str(other)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{name}: max difference 0.5")
    assert out[-1].startswith("different: 17 tensors, 1 differ")
    assert cli.main(["verify", str(good / "llm"), str(other), "--tolerance", "0.6"]) == 0
    changed[name][0] = float("nan")
    broken = checkpoint.write_tensors(tmp_path / "nan", 0, changed, state, good / "ckpt/iter_0000000/tokenizer")
    assert cli.main(["verify", str(broken), str(broken), "--tolerance", "0.6"]) == 1, "what is no number equals nothing"


def test_junk_in_the_zero_padding_is_refused(tmp_path: Path) -> None:
    table = [rules.zero_padded("x", "y", (2, 2), (3, 3)), rules.all_zero("b", (2,))]
    padded = torch.zeros(3, 3)
    padded[:2, :2] = 1
    McoreView(table, TensorsInMemory({"y": padded, "b": torch.zeros(2)}), "here")
    padded[1, 2] = padded[2, 0] = -0.0
    McoreView(table, TensorsInMemory({"y": padded, "b": torch.zeros(2)}), "here")
    padded[2, 0] = 1e-30
    with pytest.raises(CheckpointError, match=r"here: y holds values"):
        McoreView(table, TensorsInMemory({"y": padded, "b": torch.zeros(2)}), "here")


@pytest.mark.parametrize(
    "flags",
    [
        ["import", "--output", "out", "--llm", ""],
        ["import", "--output", "out", "--model", ""],
        ["import", "--output", "out", "--llm", "llm", "--vision", ""],
        ["import", "--output", "out", "--llm", "llm", "--tokenizer", ""],
        ["import", "--output", "out", "--llm", "llm", "--config", ""],
        ["import", "--llm", "llm", "--output", ""],
        ["export", "--format", "llm", "--output", "out", "--checkpoint", ""],
        ["export", "--format", "llm", "--output", "", "--checkpoint", "ckpt"],
        ["export", "--format", "llm", "--output", "out", "--checkpoint", "ckpt", "--tokenizer", ""],
        ["verify", "", "ckpt"],
        ["verify", "ckpt", ""],
        ["verify", ""],
    ],
)
def test_a_name_out_of_a_variable_that_is_not_set_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the current directory nor a default is what was meant."""
    with pytest.raises(SystemExit) as ended:
        cli.main(flags)
    assert ended.value.code == 2
    assert "is empty" in capsys.readouterr().err
