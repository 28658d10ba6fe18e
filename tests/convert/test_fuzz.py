"""Whatever JSON or bytes stand in a folder, it is read, or refused with one line that names it: no other error, no
endless work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.convert import cli
from megatron_vita.convert.opening import open_model, open_tower
from megatron_vita.convert.safetensors_folder import SafetensorsFolder
from megatron_vita.errors import CheckpointError, ConfigError
from tests.convert import publishers

pytest.importorskip("transformers")

Spot = tuple[Any, ...]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DECODERS = ("qwen2", "qwen2 yarn", "qwen3", "llama 3.1 tied")
TOWERS = ("InternViT, remote names", *publishers.TOWERS)
FAMILIES = (*DECODERS, *TOWERS, "internvl", "long_vita")

_WORDS = [
    *("qwen2", "qwen3", "llama", "internvl", "long_vita", "intern_vit_6b", "internvl_vision", "siglip", "clip"),
    *("rms_norm", "layer_norm", "silu", "gelu", "full_attention", "default", "llama3", "dynamic", "yarn", "linear"),
    "\ud800",
]
_KEYS = [
    *("model_type", "rope_theta", "rope_type", "type", "factor", "hidden_size", "num_hidden_layers", "hidden_act"),
    *("quantization_config", "compression_config", "layer_types", "rope_scaling", "rope_parameters", "num_experts"),
    *("use_sliding_window", "partial_rotary_factor", "is_causal", "attention_bias", "mlp_bias", "head_dim"),
    *("num_key_value_heads", "vision_config", "vision_config_dict", "text_config", "visual", "tie_word_embeddings"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("attention_factor", "low_freq_factor", "high_freq_factor", "max_position_embeddings"),
    *("image_seq_length", "norm_type", "qkv_bias", "qk_normalization", "use_qk_norm", "num_channels"),
]
_SIZES = [0, -1, 1, 2, 12, 96, 1024, 5000, 2_000_000, 1 << 31, 1 << 63, 10**30, 10**400]
_LEAF = (
    st.none() | st.booleans() | st.sampled_from(_SIZES) | st.floats() | st.sampled_from(_WORDS) | st.text(max_size=5)
)
JSON = st.recursive(
    _LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=6,
)


def spots(value: Any, path: Spot = ()) -> Iterator[Spot]:
    """The place of every value inside a JSON value, its own included."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from spots(inner, (*path, key))


def changed(value: Any, path: Spot, new: Any) -> Any:
    """A copy with another value in one place, which may be a key that was not there."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy.get(path[0]) if isinstance(copy, dict) else copy[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    out = {name: root / name.replace(" ", "_") for name in FAMILIES}
    for name in DECODERS:
        publishers.write_decoder(out[name], **publishers.DECODERS[name])
    for name in publishers.TOWERS:
        publishers.write_tower(out[name], name)
    publishers.write_intern_vit(out[TOWERS[0]], remote=True)
    publishers.write_internvl(out["internvl"])
    _write_long_vita(out["long_vita"], out["qwen2"], out[TOWERS[0]])
    shards = ["--format", "llm", "--max-shard-gb", "0.0001"]
    assert cli.main(["export", "--checkpoint", str(out["qwen2"]), "--output", str(root / "shards"), *shards]) == 0
    return {**out, "shards": root / "shards"}


def _write_long_vita(folder: Path, decoder: Path, tower: Path) -> None:
    """Long-VITA's config.json over a decoder's weights: its table of names is made, and then matches nothing."""
    folder.mkdir()
    config, visual = (json.loads((one / "config.json").read_text()) for one in (decoder, tower))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "long_vita", "visual": visual}))
    (folder / WEIGHTS).write_bytes((decoder / WEIGHTS).read_bytes())


def _refused_in_one_line(error: Exception, folder: Path) -> None:
    assert str(folder) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 700


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_config_is_read_or_refused(family: str, folders: dict[str, Path], data: st.DataObject) -> None:
    folder = folders[family]
    file = folder / "config.json"
    text = file.read_text()
    good = json.loads(text)
    places = list(spots(good))
    objects = [place for place in places if isinstance(_at(good, place), dict)]
    added = st.tuples(st.sampled_from(objects), st.sampled_from(_KEYS)).map(lambda pair: (*pair[0], pair[1]))
    spot = data.draw(st.sampled_from(places) | added)
    try:
        file.write_text(json.dumps(changed(good, spot, data.draw(JSON))))
        (open_tower if family in TOWERS else open_model)(folder)
    except (CheckpointError, ConfigError) as error:
        _refused_in_one_line(error, folder)
    finally:
        file.write_text(text)


def _at(value: Any, path: Spot) -> Any:
    return _at(value[path[0]], path[1:]) if path else value


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_index_is_read_or_refused(folders: dict[str, Path], data: st.DataObject) -> None:
    folder = folders["shards"]
    text = (folder / INDEX).read_text()
    good = json.loads(text)
    spot = data.draw(st.sampled_from(list(spots(good))))
    try:
        (folder / INDEX).write_text(json.dumps(changed(good, spot, data.draw(JSON))))
        SafetensorsFolder(folder)
    except CheckpointError as error:
        _refused_in_one_line(error, folder)
    finally:
        (folder / INDEX).write_text(text)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_header_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    header: Any = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    if data.draw(st.booleans()):
        header = changed(header, data.draw(st.sampled_from(list(spots(header)))), data.draw(JSON))
    content = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 9)) == 0:
        content = bytearray(data.draw(st.binary(max_size=40)))
    folder = tmp_path_factory.getbasetemp() / "header"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(len(content).to_bytes(8, "little") + content + bytes(32))
    try:
        opened = SafetensorsFolder(folder)
    except CheckpointError as error:
        _refused_in_one_line(error, folder)
    else:
        for name in opened:
            assert opened.read(name).shape == opened.shape(name)
