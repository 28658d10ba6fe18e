"""Every setting that the stock configuration classes know is read, refused by name, or says nothing; none is missed.

The list is taken from the classes themselves, so that a newer transformers with a setting more fails here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_vita.convert.families import decoder as decoders
from megatron_vita.convert.families import intern_vit, internvl, siglip_clip
from megatron_vita.convert.opening import open_model, open_tower
from megatron_vita.errors import CheckpointError
from tests.convert import fields, published, publishers
from tests.convert.fields import Inert, Read, Refused

transformers = pytest.importorskip("transformers")

_TOWER = published.intern_vit("InternViT-300M-448px", native=True)
_NESTED = published.TEXT_TOWERS
_READERS: dict[str, tuple[Callable[[Mapping[str, Any], str], Any], dict[str, Any]]] = {
    "Qwen2Config": (decoders.read_config, published.decoder("Qwen2.5-14B")),
    "Qwen3Config": (decoders.read_config, published.decoder("Qwen3-8B")),
    "LlamaConfig": (decoders.read_config, published.decoder("Llama-3-8B")),
    "MistralConfig": (decoders.read_config, published.decoder("Mistral-7B-v0.3")),
    "GlmConfig": (decoders.read_config, published.decoder("GLM-4-9B-chat")),
    "InternVLVisionConfig": (intern_vit.read_config, _TOWER),
    "InternVLConfig": (
        internvl.read_config,
        {**published.internvl("InternVL3.5-8B"), "tie_word_embeddings": False},
    ),
    "SiglipVisionConfig": (
        siglip_clip.read_config,
        _NESTED["SigLIP-so400m-patch14-224"]["vision_config"],
    ),
    "CLIPVisionConfig": (siglip_clip.read_config, _NESTED["CLIP-L-14-336"]["vision_config"]),
}
"""Stock class -> who reads it, and a published config.json."""
_TOWERS = ("InternVLVisionConfig", "SiglipVisionConfig", "CLIPVisionConfig")
_CASES = [
    (kind, name) for kind, table in fields.CLASSES.items() for name in fields.EVERYWHERE | table if name != "model_type"
]


@pytest.mark.parametrize("kind", fields.CLASSES)
def test_every_setting_of_the_stock_class_is_accounted_for(kind: str) -> None:
    known = set(getattr(transformers, kind)().to_dict())
    overlooked = known - set(fields.EVERYWHERE | fields.CLASSES[kind])
    assert not overlooked, f"{kind} has new settings. Read or refuse them, and say so in tests/convert/fields.py."
    assert set(fields.EVERYWHERE) <= known
    assert _READERS.keys() == fields.CLASSES.keys()


@pytest.mark.parametrize(("kind", "name"), _CASES, ids=[f"{kind}.{name}" for kind, name in _CASES])
def test_a_setting_is_read_refused_or_says_nothing(kind: str, name: str) -> None:
    read, config = _READERS[kind]
    use = fields.use_of(kind, name)
    changed = {**config, name: use.other}
    assert changed != config
    if isinstance(use, Refused):
        with pytest.raises(CheckpointError, match=f"config.json: .*{name}"):
            read(changed, "config.json")
    elif isinstance(use, Read):
        assert read(changed, "config.json") != read(config, "config.json")
    else:
        assert isinstance(use, Inert)
        assert read(changed, "config.json") == read(config, "config.json")


@pytest.mark.parametrize("kind", fields.CLASSES)
def test_an_unknown_kind_is_refused_before_a_tensor_is_looked_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**_READERS[kind][1], "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type='mamba' is not supported"):
        (open_tower if kind in _TOWERS else open_model)(tmp_path)


_BY8 = published.decoder("Llama-3.1-8B")["rope_scaling"]
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Qwen2.5-7B", {"rope_scaling": {**_YARN, "factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
        ("Qwen2.5-7B", {"rope_scaling": {**_YARN, "factor": None}}, "rope_scaling.factor must be a number .* got None"),
        ("Qwen2.5-7B", {"rope_scaling": {**_YARN, "factor": 1e6}}, "factor=1000000.0 of 32768 tokens is more than"),
        ("Qwen2.5-7B", {"rope_scaling": {**_YARN, "beta": 3}}, "rope_scaling.beta=3 is not supported with yarn"),
        ("Qwen2.5-7B", {"rope_scaling": {**_YARN, "beta_slow": 64}}, "yarn_beta_fast=32.0 must be at least .*64.0"),
        (
            "Qwen2.5-7B",
            {"rope_scaling": {**_YARN, "truncate": 0}},
            "truncate must be true or false, got 0",
        ),
        (
            "Qwen2.5-7B",
            {"rope_scaling": _YARN, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings differently .*4096.* 32768",
        ),
        ("Qwen2.5-7B", {"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        ("Qwen2.5-7B", {"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be a string, got 3"),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {**_BY8, "rope_type": "longrope"}},
            "rope_scaling='longrope' .*cache.*Or remove it if it was not trained with",
        ),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {**_BY8, "high_freq_factor": 1.0}},
            "high_freq_factor=1.0 must be above .*low_freq_factor=1.0",
        ),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor must be a number above 0, got None",
        ),
        # Releases differ in which of two they believe.
        (
            "Llama-3.1-8B",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"says its rotary scaling \(rope_scaling_factor\) differently \(rope_parameters None, rope_scaling 8.0\)",
        ),
        (
            "Qwen3-8B",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
            r"says its rotary base differently \(rope_theta 1000000.0, rope_parameters.rope_theta 5000000.0\)",
        ),
        ("Qwen3-8B", {"rope_theta": ...}, "names no rope_theta"),
        ("Qwen3-8B", {"num_key_value_heads": ...}, "names no num_key_value_heads"),
        ("Qwen2.5-7B", {"num_key_value_heads": ...}, "names no num_key_value_heads"),
        ("Qwen2.5-7B", {"num_experts": 60, "model_type": "qwen2_moe"}, "num_experts=60 .*no mixture of experts"),
        ("Qwen3-8B", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*dequantise the weights"),
        ("Qwen3-8B", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' .*'silu' only"),
        ("Qwen2.5-7B", {"use_sliding_window": True}, "use_sliding_window=True .*full attention only"),
    ],
)
def test_what_is_refused_says_what_and_what_to_do(name: str, change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**published.decoder(name), **change}.items() if value is not ...}
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        decoders.read_config(config, "config.json")


@pytest.mark.parametrize("window", [4096, None, 32768, ...])
def test_a_window_that_a_mistral_can_reach_is_refused(window: Any) -> None:
    """Mistral-7B-v0.1 attends within 4096 tokens, which is also what its class does where nothing is said."""
    config = {**published.decoder("Mistral-7B-v0.3"), "sliding_window": window}
    config = {key: value for key, value in config.items() if value is not ...}
    if window in (4096, ...):
        with pytest.raises(CheckpointError, match=r"sliding_window=4096 .*null, or at least 32768 tokens"):
            decoders.read_config(config, "config.json")
    else:
        assert decoders.read_config(config, "config.json").max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("inside", "outside", "wanted"),
    [(..., ..., 0.5), (0.25, ..., 0.25), (..., 0.25, 0.25), (0.25, 0.25, 0.25), (0.25, 0.5, None), (..., 0.29, None)],
)
def test_the_share_of_a_head_that_glm_turns(inside: Any, outside: Any, wanted: float | None) -> None:
    """Half, where nothing is said; in either place; never two shares, nor an odd number of dimensions."""
    config = published.decoder("GLM-4-9B-chat")
    theta, config["partial_rotary_factor"] = config.pop("rope_theta"), outside
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": inside}
    config = {key: value for key, value in config.items() if value is not ...}
    if inside is ...:
        del config["rope_parameters"]["partial_rotary_factor"]
    if wanted is None:
        message = "partial_rotary_factor differently" if inside != ... else "rotary_percent=0.29: .* turn 37 numbers"
        with pytest.raises(CheckpointError, match=message):
            decoders.read_config(config, "config.json")
        return
    model = decoders.read_config(config, "config.json")
    assert (model.rotary_percent, model.rotary_interleaved) == (wanted, True)
    rotary = published.stock_config(config).rope_parameters["partial_rotary_factor"]
    assert rotary == wanted


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-8B", "Llama-3.1-8B", "Mistral-7B-v0.3", "GLM-4-9B-chat"])
def test_releases_read_one_rotary_embedding_and_one_head_size(name: str) -> None:
    """Releases before 5 know rope_theta and rope_scaling alone; no size of a head follows from the others."""
    model = replace(decoders.read_config(published.decoder(name), name), kv_channels=96)
    written = decoders.write_config(model, "bfloat16", {}, published.decoder(name)["model_type"])
    older = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    for values in (older, newer):
        assert decoders.read_config(values, name) == model
        stock = published.stock_config(values)
        fields.same_computation(stock, published.stock_config(written))
        assert (stock.head_dim, stock.dtype) == (96, torch.bfloat16)


def test_llama_2_has_as_many_groups_as_heads() -> None:
    config = published.decoder("Llama-3-8B")
    for changed in ({**config, "num_key_value_heads": None}, {k: v for k, v in config.items() if "key_value" not in k}):
        stock = published.stock_config(changed)
        assert decoders.read_config(changed, "x").num_query_groups == stock.num_key_value_heads == 32


def test_a_scaling_by_length_is_none_up_to_the_published_length(caplog: pytest.LogCaptureFixture) -> None:
    """transformers' dynamic scaling at its longest published sequence turns as no scaling does."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = published.internvl("InternVL3-8B")["text_config"]
    with caplog.at_level(logging.WARNING):
        model = decoders.read_config(text, "config.json")
    assert "taken for none" in caplog.text
    assert "32768 tokens" in caplog.text
    assert model == decoders.read_config({**text, "rope_scaling": None}, "config.json")
    stock = published.stock_config(text)
    plain = 1 / 1e6 ** (torch.arange(0, 128, 2) / 128)
    at_most, _ = ROPE_INIT_FUNCTIONS["dynamic"](stock, torch.device("cpu"), seq_len=32768)
    beyond, _ = ROPE_INIT_FUNCTIONS["dynamic"](stock, torch.device("cpu"), seq_len=65536)
    torch.testing.assert_close(at_most, plain)
    assert not torch.allclose(beyond, plain)


def test_clip_says_its_sizes_twice_and_the_second_counts() -> None:
    config = {**_NESTED["CLIP-L-14"], "vision_config": {"model_type": "clip_vision_model", "image_size": 336}}
    vision = siglip_clip.read_config(config, "x")
    stock = published.stock_config(config).vision_config
    assert (vision.hidden_size, vision.image_size) == (stock.hidden_size, stock.image_size) == (1024, 224)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outer", "inner", "head", "own"),
    [
        (None, None, True, True),  # InternVL3
        (True, None, True, True),  # InternVL3, written again by newer releases
        (True, False, True, True),
        (False, False, True, True),
        (None, None, False, False),
        (True, False, False, False),
        (None, True, False, False),
        (None, True, True, False),  # a copy of the embedding
    ],
)
def test_an_internvl_has_the_head_that_stock_code_gives_it(
    outer: bool | None, inner: bool | None, head: bool, own: bool, tmp_path: Path
) -> None:
    publishers.write_internvl(tmp_path, tied=not head)
    config = json.loads((tmp_path / "config.json").read_text())
    for values, tied in ((config, outer), (config["text_config"], inner)):
        values.pop("tie_word_embeddings", None)
        if tied is not None:
            values["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps(config))
    if head and not own:
        tensors = publishers.tensors_of(tmp_path)
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    apart = stock.lm_head.weight.data_ptr() != stock.get_input_embeddings().weight.data_ptr()
    opened = open_model(tmp_path)
    assert opened.model.untie_embeddings_and_output_weights == own == apart
    if own:
        torch.testing.assert_close(opened.tensors["language_model.output_layer.weight"], stock.lm_head.weight.detach())
