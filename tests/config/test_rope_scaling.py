"""Rotary settings of a recipe, and a scaling that is turned on for a model trained without."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vita.config import ModelConfig, load_run, rope_scaling_json, to_dict, with_rope_scaling
from megatron_vita.config.load import stage_from_dict
from megatron_vita.config.rope_scaling import length_before_scaling, rope_scaling_of, rope_settings
from megatron_vita.errors import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ON = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 32768,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position_embedding_type": "alibi"}, "model.position_embedding_type='alibi': choose rope or yarn"),
        ({"position_embedding_type": "yarn"}, "takes model.yarn_rotary_scaling_factor, which is not set"),
        ({**ON, "yarn_original_max_position_embeddings": None}, "takes model.yarn_original_max.* not set"),
        ({"yarn_rotary_scaling_factor": 4.0}, "yarn_rotary_scaling_factor=4.0 takes .*position_embedding_type=yarn"),
        ({"yarn_beta_fast": 16.0}, "yarn_beta_fast=16.0 takes model.position_embedding_type=yarn, which is rope"),
        ({**ON, "yarn_rotary_scaling_factor": 0.5}, "yarn_rotary_scaling_factor=0.5 must be at least 1"),
        ({**ON, "yarn_rotary_scaling_factor": float("nan")}, "yarn_rotary_scaling_factor=nan must be at least 1"),
        ({**ON, "yarn_original_max_position_embeddings": 0}, "yarn_original_max_position_embeddings=0 must be at"),
        ({**ON, "yarn_beta_slow": 33.0}, "yarn_beta_fast=32.0 must be at least yarn_beta_slow=33.0"),
        ({**ON, "yarn_beta_fast": 1e9}, "yarn_beta_fast=1000000000.0 .*1e6"),
        ({**ON, "yarn_beta_slow": 0.0}, "yarn_beta_slow=0.0 must be above 0"),
        ({**ON, "yarn_mscale": 0.7}, "yarn_mscale=0.7 and yarn_mscale_all_dim=None act together"),
        ({**ON, "yarn_attention_factor": 0.0}, "yarn_attention_factor=0.0 must be above 0"),
        ({**ON, "rotary_base": 1.0}, "rotary_base=1.0 must be above 1 with YaRN"),
        ({**ON, "rope_scaling_factor": 8.0}, "rope_scaling_factor=8.0 and yarn_rotary_scaling_factor=4.0 are two"),
        (
            {"rotary_seq_len_interpolation_factor": 2.0, "rope_scaling_factor": 8.0},
            "rotary_seq_len_interpolation_factor=2.0 and rope_scaling_factor=8.0 are two scalings",
        ),
        ({"rotary_seq_len_interpolation_factor": 0.1}, "rotary_seq_len_interpolation_factor=0.1 must be at least 1"),
        ({"rope_scaling_high_freq_factor": 1.0}, "rope_scaling_high_freq_factor=1.0 must be above .*=1.0"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**settings)


def test_yarn_in_a_recipe_on_the_command_line_and_in_a_stage(tmp_path: Path) -> None:
    """A later stage turns it on; flags carry the settings' names; the run's own record says the same again."""
    path = tmp_path / "run.yaml"
    later = {"model": {"position_embedding_type": "yarn", "yarn_original_max_position_embeddings": 2048}}
    stages = [{"name": "short"}, {"name": "long", **later}]
    path.write_text(yaml.safe_dump({"model": {"vocab_size": 9}, "stages": stages}))
    with pytest.raises(ConfigError, match=r"stage 2: model.position_embedding_type=yarn takes model.yarn_rotary_scal"):
        load_run(path)
    stages[1]["model"]["yarn_rotary_scaling_factor"] = 8  # type: ignore[index]
    path.write_text(yaml.safe_dump({"model": {"vocab_size": 9}, "stages": stages}))
    short, long = load_run(path).stages
    assert (short.model.rope_type, long.model.rope_type) == ("default", "yarn")
    assert stage_from_dict(to_dict(long), "run.json") == long
    flags = ["--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", "4"]
    flags += ["--yarn-original-max-position-embeddings", "1024", "--yarn-correction-range-round-to-int", "false"]
    flags += ["--yarn-beta-fast=16", "--yarn-attention-factor", "1.5"]
    first = load_run(path, flags).stages[0].model
    assert rope_scaling_of(first) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
        "truncate": False,
        "attention_factor": 1.5,
    }
    path.write_text(yaml.safe_dump({"model": {"vocab_size": 9}}))
    linear = load_run(path, ["--rotary-seq-len-interpolation-factor", "4"]).stages[0].model
    assert (linear.rope_type, linear.rotary_seq_len_interpolation_factor) == ("linear", 4.0)


def test_a_scaling_is_turned_on_replaced_and_turned_off() -> None:
    model = ModelConfig(max_position_embeddings=32768, rotary_percent=0.5, rotary_interleaved=True)
    assert with_rope_scaling(model) == model
    yarn = with_rope_scaling(model, {"rope_type": "yarn", "factor": 4})
    assert yarn == replace(model, **ON, max_position_embeddings=131072)
    assert with_rope_scaling(yarn) == yarn
    assert with_rope_scaling(yarn, rope_scaling_of(yarn)) == yarn
    assert with_rope_scaling(yarn, {"rope_type": "default"}) == model
    half = with_rope_scaling(yarn, {"rope_type": "yarn", "factor": 2.0})
    assert half == replace(yarn, yarn_rotary_scaling_factor=2.0, max_position_embeddings=65536)
    linear = with_rope_scaling(yarn, {"type": "linear", "factor": 3.0})
    assert linear == replace(model, rotary_seq_len_interpolation_factor=3.0, max_position_embeddings=98304)
    assert with_rope_scaling(linear, {"rope_type": "yarn", "factor": 4.0}) == yarn
    llama = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
    assert with_rope_scaling(model, llama).max_position_embeddings == 8 * 32768
    base = with_rope_scaling(model, rotary_base=5e6, max_position_embeddings=1_000_000)
    assert base == replace(model, rotary_base=5e6, max_position_embeddings=1_000_000)
    parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert with_rope_scaling(model, parameters, max_position_embeddings=99) == replace(
        yarn, rotary_base=5e6, max_position_embeddings=99
    )
    assert length_before_scaling(linear) == length_before_scaling(yarn) == length_before_scaling(model) == 32768


@pytest.mark.parametrize(
    ("scaling", "base", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, None, "rope_scaling='dynamic' .*cache.*yarn, or a fixed NTK base"),
        ({"rope_type": "longrope"}, None, "rope_scaling='longrope' is not supported"),
        ({"rope_type": "su"}, None, "rope_scaling='su' is not supported: known: default, linear, llama3, yarn"),
        ({**YARN, "rope_theta": 1e4}, 1e5, "rope_theta=10000.0 and rotary_base=100000.0 differ"),
        ({**YARN, "rope_theta": "1e4"}, None, "rope_scaling.rope_theta must be a number above 0, got '1e4'"),
        ({**YARN, "partial_rotary_factor": 0.5}, None, "partial_rotary_factor=0.5: the weights turn 1.0"),
        ({**YARN, "factor": True}, None, "rope_scaling.factor must be a number above 0, got True"),
        ({**YARN, "factor": 10**400}, None, "rope_scaling.factor must be a number above 0, got 1000"),
        ({**YARN, "original_max_position_embeddings": 1.5}, None, "original_max_position_embeddings must be a whole"),
        ({"rope_type": "default", "factor": 2.0}, None, "rope_scaling.factor=2.0 is not supported with default"),
        (None, 0.0, "rotary_base=0.0 must be above 0"),
    ],
)
def test_a_bad_override_is_refused(scaling: dict[str, Any] | None, base: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_rope_scaling(ModelConfig(), scaling, rotary_base=base)


def test_json_of_the_flag_is_read_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rope-scaling", type=rope_scaling_json)
    given = parser.parse_args(["--rope-scaling", '{"rope_type": "yarn", "factor": 4, "rope_theta": 1e6}'])
    assert given.rope_scaling == {"rope_type": "yarn", "factor": 4, "rope_theta": 1e6}
    assert rope_scaling_json('{"type": "default", "partial_rotary_factor": 0.5}')["partial_rotary_factor"] == 0.5
    for text, message in (
        ("yarn", "'yarn' is no JSON: Expecting value"),
        ("[" * 100_000, "is no JSON: "),
        ("[4]", '\'[4]\' is no JSON object. Example: {"rope_type": "yarn"'),
        ('{"factor": 4}', "names no rope_type. Choose one of default, linear, llama3, yarn"),
        ('{"rope_type": "yarn"}', "rope_scaling.factor must be a number above 0, got None"),
        ('{"rope_type": "yarn", "factor": NaN}', "rope_scaling.factor must be a number above 0, got nan"),
        ('{"rope_type": "yarn", "factr": 4}', "rope_scaling.factr=4 is not supported with yarn"),
        ('{"rope_type": "longrope"}', "rope_scaling='longrope' is not supported"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rope-scaling", text])
        assert message in capsys.readouterr().err


def test_what_transformers_takes_for_nothing_said_is_nothing_said() -> None:
    said = {**YARN, "beta_fast": None, "beta_slow": 0, "mscale": 1.0, "attention_factor": None, "finetuned": True}
    assert ModelConfig(**rope_settings(said, 32768)) == ModelConfig(**rope_settings(YARN, 32768))
