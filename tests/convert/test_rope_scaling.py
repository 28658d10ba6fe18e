"""Rotary scaling in both directions of conversion: logits of stock transformers, both spellings, round trips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, with_rope_scaling
from megatron_vita.config.rope_scaling import length_before_scaling
from megatron_vita.convert import cli, logits, open_model
from megatron_vita.convert.families import decoder as decoders
from megatron_vita.convert.families import long_vita
from megatron_vita.convert.logits import ProbePrompt
from megatron_vita.errors import CheckpointError
from megatron_vita.parallel.rotary import inverse_frequencies
from tests.convert import published, publishers
from tests.parallel.test_rotary import LLAMA3, YARN
from tests.ranks import run_ranks

pytest.importorskip("transformers")

LENGTH = 1000
SHORT: dict[str, Any] = {**YARN, "original_max_position_embeddings": 32}
"""A scaling to 128 tokens; sequences of LENGTH go far beyond that, too."""
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_scaling": SHORT},
    "qwen2 linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "qwen3 tied": {
        "model_type": "qwen3",
        "head_dim": 14,
        "tie_word_embeddings": True,
        "rope_scaling": {**SHORT, "factor": 32.0, "beta_fast": 8, "beta_slow": 0.5, "truncate": False},
    },
    "llama": {
        "model_type": "llama",
        "rope_theta": 1e4,
        "rope_scaling": {**SHORT, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    },
    "llama 3": {
        "model_type": "llama",
        "rope_theta": 1e4,
        "rope_scaling": {**LLAMA3, "high_freq_factor": 3.0, "original_max_position_embeddings": 64},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_scaling": {**SHORT, "attention_factor": 1.4}},
    "glm": {"model_type": "glm", "head_dim": 16, "rope_theta": 1e4, "pad_token_id": 0, "rope_scaling": SHORT},
    "glm quarter": {
        "model_type": "glm",
        "head_dim": 24,
        "partial_rotary_factor": 0.25,
        "pad_token_id": 0,
        "rope_scaling": {**SHORT, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 3},
    },
}


def convert(*arguments: object) -> None:
    assert cli.main([str(one) for one in arguments]) == 0


def _prompt() -> ProbePrompt:
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    return ProbePrompt(tokens, torch.zeros(0, 3, 1, 1, dtype=torch.uint8), ())


def _same_as_stock(folders: dict[str, tuple[str, str]]) -> None:
    """Our logits of each checkpoint, and stock transformers' of the folder it was imported from and its export."""
    for name, (ckpt, *stock) in folders.items():
        opened = open_model(Path(ckpt))
        prompt = _prompt()
        ours = logits.our_logits(opened, prompt)
        unscaled = dataclasses.replace(opened, model=with_rope_scaling(opened.model, {"rope_type": "default"}))
        other = logits.our_logits(unscaled, prompt)
        assert (other - ours).abs().max() > 0.1, f"{name}: scaling changes nothing"
        for folder in stock:
            wanted = logits.stock_logits(open_model(Path(folder)), prompt)
            assert wanted.abs().max() > 1, f"{name}: logits too small to compare"
            gap = (wanted - ours).abs().max().item()
            assert gap < 1e-4, f"{name}: logits differ by {gap} from {folder}"


@pytest.mark.slow
def test_logits_far_beyond_the_original_length_equal_stock(tmp_path: Path) -> None:
    folders = {}
    for seed, (name, changes) in enumerate(CASES.items()):
        hf, ckpt, back, again = (tmp_path / f"{kind} {name}" for kind in ("hf", "ckpt", "back", "again"))
        publishers.write_decoder(hf, seed=seed, **changes)
        convert("import", "--llm", hf, "--output", ckpt)
        convert("export", "--checkpoint", ckpt, "--output", back, "--format", "llm")
        convert("import", "--llm", back, "--output", again)
        model = checkpoint.read_state(ckpt).stage.model
        assert model.rope_type == changes["rope_scaling"]["rope_type"]
        assert checkpoint.read_state(again).stage.model == model
        folders[name] = (str(ckpt), str(hf), str(back))
    run_ranks(1, _same_as_stock, folders)


def _turned_on(ckpt: str, folder: str, scaling: dict[str, Any]) -> None:
    """with_rope_scaling on a checkpoint without, against stock transformers on a folder whose config.json has it."""
    opened = open_model(Path(ckpt))
    assert opened.model.rope_type == "default"
    scaled = dataclasses.replace(opened, model=with_rope_scaling(opened.model, scaling, rotary_base=5e4))
    prompt = _prompt()
    wanted = logits.stock_logits(open_model(Path(folder)), prompt)
    assert (logits.our_logits(scaled, prompt) - wanted).abs().max() < 1e-4
    assert (logits.our_logits(opened, prompt) - wanted).abs().max() > 0.1


@pytest.mark.slow
def test_yarn_turned_on_equals_stock_with_the_scaling_in_its_config(tmp_path: Path) -> None:
    publishers.write_decoder(tmp_path / "hf", max_position_embeddings=256)
    convert("import", "--llm", tmp_path / "hf", "--output", tmp_path / "ckpt")
    path = tmp_path / "hf" / "config.json"
    scaling = {"rope_type": "yarn", "factor": 4.0}
    edited = {**_newer(json.loads(path.read_text())), "rope_scaling": scaling, "rope_theta": 5e4}
    del edited["rope_parameters"]
    path.write_text(json.dumps(edited))
    run_ranks(1, _turned_on, str(tmp_path / "ckpt"), str(tmp_path / "hf"), scaling)


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """The spelling before transformers 5: rope_theta and rope_scaling."""
    rope = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    return {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_scaling": rope}


def _newer(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's own: rope_parameters."""
    return {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}


_SCALINGS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 64)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 64),
            "low_freq_factor": st.floats(0.1, 2),
            "high_freq_factor": st.floats(2.5, 20),
            "original_max_position_embeddings": st.integers(1, 1 << 17),
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.floats(1, 64)},
        optional={
            "original_max_position_embeddings": st.integers(1, 1 << 17),
            "attention_factor": st.none() | st.floats(0.1, 10),
            "beta_fast": st.none() | st.floats(4, 100),
            "beta_slow": st.none() | st.floats(0.01, 4),
            "mscale": st.none() | st.floats(0, 3),
            "mscale_all_dim": st.none() | st.floats(0, 3),
            "truncate": st.booleans(),
        },
    ),
)


@given(
    scaling=_SCALINGS,
    length=st.integers(1, 1 << 20),
    family=st.sampled_from(["Qwen2.5-7B", "Qwen3-8B", "Llama-3-8B", "Mistral-7B-v0.3", "GLM-4-9B-chat"]),
)
@example(scaling={"rope_type": "yarn", "factor": 56.0}, length=684785, family="Qwen2.5-7B")  # written: scaled already
@settings(deadline=None)
def test_any_scaling_is_read_and_written_in_both_spellings(scaling: dict[str, Any], length: int, family: str) -> None:
    """Ours after a round trip, and transformers' frequencies, attention factor and settings from what was written."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {**published.decoder(family), "rope_scaling": scaling, "max_position_embeddings": length}
    model = decoders.read_config(config, "x")
    written = decoders.write_config(model, "float32", {}, config["model_type"])
    assert isinstance(written["max_position_embeddings"], int)
    init = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    wanted, factor = init(published.stock_config(config), torch.device("cpu"))
    for one in (written, _older(written), _newer(written)):
        assert decoders.read_config(one, "x") == model
        frequencies, same = init(published.stock_config(one), torch.device("cpu"))
        assert torch.equal(frequencies, wanted)
        assert same == pytest.approx(factor)


@pytest.mark.parametrize(
    ("stated", "scaling", "longest", "written"),
    [
        (32768, YARN, 131072, 131072),  # as Qwen2.5's card says it: max_position_embeddings stays
        (131072, YARN, 131072, 131072),  # the extended length, as others state it
        (40960, YARN, 131072, 131072),  # Qwen3
        (163840, {**YARN, "factor": 40, "original_max_position_embeddings": 4096}, 163840, 163840),  # DeepSeek's
        (32768, {"type": "yarn", "factor": 4.0}, 131072, 131072),
        (4096, {"type": "linear", "factor": 4.0}, 16384, 4096),
        (4096, {"type": "linear", "factor": 1.3}, 5324, 4096),
        (131072, {**LLAMA3, "factor": 32.0}, 131072, 131072),  # Llama 3.2
        (32768, {"type": "dynamic", "factor": 2.0}, 32768, 32768),  # refused beyond
    ],
)
def test_the_longest_sequence_is_the_scaled_one(
    stated: int, scaling: dict[str, Any], longest: int, written: int
) -> None:
    config = {**published.decoder("Qwen2.5-7B"), "rope_scaling": scaling, "max_position_embeddings": stated}
    model = decoders.read_config(config, "x")
    assert model.max_position_embeddings == longest
    assert decoders.write_config(model, "float32", {})["max_position_embeddings"] == written


@given(length=st.integers(1, 1 << 22), factor=st.floats(1, 64))
def test_linear_scaling_finds_the_stated_length_again(length: int, factor: float) -> None:
    model = ModelConfig(rotary_seq_len_interpolation_factor=factor, max_position_embeddings=int(length * factor))
    stated = length_before_scaling(model)
    assert stated <= length
    assert int(stated * factor) == int(length * factor)


def test_the_window_of_a_mistral_must_reach_as_far_as_yarn() -> None:
    config = {**published.decoder("Mistral-7B-v0.3"), "sliding_window": 32768, "rope_scaling": YARN}
    with pytest.raises(CheckpointError, match=r"sliding_window=32768 .*at least 131072 tokens"):
        decoders.read_config(config, "x")


def test_an_original_length_beside_the_scaling_is_read_as_transformers_reads_it() -> None:
    """Phi's place, which transformers prefers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = {**published.decoder("Qwen2.5-7B"), "rope_scaling": scaling, "original_max_position_embeddings": 4096}
    model = decoders.read_config(config, "x")
    assert (model.yarn_original_max_position_embeddings, model.max_position_embeddings) == (4096, 32768)
    wanted, _ = ROPE_INIT_FUNCTIONS["yarn"](published.stock_config(config), torch.device("cpu"))
    assert torch.equal(inverse_frequencies(model)[0], wanted)


@pytest.mark.slow
def test_yarn_in_a_model_with_a_tower_comes_back_in_either_format(tmp_path: Path) -> None:
    publishers.write_internvl(tmp_path / "hf", rope_scaling={**SHORT, "original_max_position_embeddings": 16})
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["rope_type"] == "yarn"
    convert("import", "--model", tmp_path / "hf", "--output", tmp_path / "ckpt")
    model = checkpoint.read_state(tmp_path / "ckpt").stage.model
    assert (model.rope_type, model.yarn_original_max_position_embeddings) == ("yarn", 16)
    convert("export", "--checkpoint", tmp_path / "ckpt", "--output", tmp_path / "back", "--format", "internvl")
    convert("import", "--model", tmp_path / "back", "--output", tmp_path / "again")
    assert checkpoint.read_state(tmp_path / "again").stage.model == model
    run_ranks(1, convert, "verify", tmp_path / "ckpt", tmp_path / "back", "--logits")
    assert model.vision is not None
    projector = dataclasses.replace(model.projector, ffn_hidden_size=model.vision.hidden_size, bias=False)
    model = dataclasses.replace(model, projector=projector)
    assert long_vita.read_config(long_vita.write_config(model, "float32", {}), "x") == model
    text = json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == text["rope_parameters"]
    assert (text["rope_scaling"]["factor"], text["max_position_embeddings"]) == (4.0, 512)
