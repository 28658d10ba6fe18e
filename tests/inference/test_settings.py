"""Settings of the engine, and the flags that say them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from megatron_vita.errors import ConfigError
from megatron_vita.inference.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    engine_settings,
    sampling_config,
)
from megatron_vita.inference.sampling import SamplingConfig
from megatron_vita.inference.settings import EngineSettings


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_arguments(made)
    add_sampling_arguments(made)
    return made


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        (None, 4 << 30), ("0.5", 4 << 30), (".25", 2 << 30), ("1", 8 << 30), ("1.0", 8 << 30), ("4GiB", 4 << 30),
        ("4gib", 4 << 30), ("1.5 GiB", 3 << 29), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("3k", 3000),
        ("7B", 7), ("123456", 123456), (" 2MiB ", 2 << 20), ("8GiB", 8 << 30),
    ],
)  # fmt: skip
def test_memory_of_the_cache_is_a_share_or_a_size(text: str | None, bytes_: int) -> None:
    assert EngineSettings(kv_cache_memory=text).kv_cache_bytes(8 << 30) == bytes_


@pytest.mark.parametrize(
    "text", ["0", "0.0", "-1", "1.5", "", "half", "4GiBB", "GiB", "5iB", "1e9", "0GiB", "9999999TiB"]
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory=.*neither a share"):
        EngineSettings(kv_cache_memory=text)


def test_a_size_that_is_not_free_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"4.29 GB, but 1 GB are free"):
        EngineSettings(kv_cache_memory="4GiB").kv_cache_bytes(10**9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_model_parallel_size", 0), ("context_parallel_size", -1), ("pipeline_model_parallel_size", True),
        ("block_size", 0), ("chunked_prefill_size", 1.5), ("max_num_seqs", 0), ("dtype", "int8"), ("lm_head", "none"),
        ("max_frames", 0), ("max_position_embeddings", 0),
        ("video_timeout", 0), ("video_timeout", float("nan")),
    ],
)  # fmt: skip
def test_bad_settings_name_the_field(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        EngineSettings(**{name: value})  # type: ignore[arg-type]


def test_every_setting_has_its_flag_and_default() -> None:
    made = parser()
    assert engine_settings(made.parse_args([])) == EngineSettings()
    other = {
        "tensor_model_parallel_size": "2", "context_parallel_size": "4", "pipeline_model_parallel_size": "3",
        "dtype": "bfloat16", "kv_cache_memory": "4GiB", "block_size": "8", "chunked_prefill_size": "64",
        "max_num_seqs": "7", "lm_head": "chunked", "rotary_base": "2.0", "max_position_embeddings": "9",
        "max_frames": "3", "video_timeout": "60.0",
    }  # fmt: skip
    assert {*other, "enable_prefix_caching", "rope_scaling"} == {field.name for field in fields(EngineSettings)}
    words = [word for name, value in other.items() for word in (f"--{name.replace('_', '-')}", value)]
    yarn = {"rope_type": "yarn", "factor": 4.0}
    said = engine_settings(made.parse_args([*words, "--enable-prefix-caching", "--rope-scaling", json.dumps(yarn)]))
    assert {name: str(getattr(said, name)) for name in other} == other
    assert said.enable_prefix_caching
    assert said.rope_scaling == yarn
    assert said.overrides == {
        "rope_scaling": yarn, "rotary_base": 2.0, "max_position_embeddings": 9, "max_frames": 3,
    }  # fmt: skip
    assert said.world_size == 24
    with pytest.raises(ConfigError, match="block_size=0"):
        engine_settings(made.parse_args(["--block-size", "0"]))


def test_sampling_is_greedy_unless_flags_say_otherwise() -> None:
    made = parser()
    assert sampling_config(made.parse_args([])) == SamplingConfig()
    other = SamplingConfig(
        temperature=2.0, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=1.5, presence_penalty=-1.0,
        frequency_penalty=0.5, seed=4, stop=("a", "b"), stop_token_ids=(5, 6), min_tokens=7, ignore_eos=True,
    )  # fmt: skip
    words = ["--ignore-eos"]
    for field in fields(SamplingConfig):
        value = getattr(other, field.name)
        if value is not True and value != getattr(SamplingConfig(), field.name):
            flag = f"--{field.name.replace('_', '-').replace('-ids', '-id')}"
            words += [word for one in (value if isinstance(value, tuple) else [value]) for word in (flag, str(one))]
    assert sampling_config(made.parse_args(words)) == other
    with pytest.raises(ConfigError, match="temperature"):
        sampling_config(made.parse_args(["--temperature", "-1"]))


def test_a_command_line_is_checked_before_torch_is_imported() -> None:
    code = "import sys, megatron_vita.inference.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
