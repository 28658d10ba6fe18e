"""Hugging Face's `rope_scaling` (transformers 5: `rope_parameters`) as rotary settings, and back; YaRN at inference."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from reprlib import repr as shown
from typing import Any

from megatron_vita.config.model import ModelConfig
from megatron_vita.config.rotary import RotaryConfig
from megatron_vita.errors import ConfigError

_REFUSED = {
    "dynamic": "its base changes with the length, so that a cache holds keys of another base than later queries. Take "
    "yarn, or a fixed NTK base, rotary_base * factor ** (d / (d - 2)) for d rotated numbers of a head",
    "longrope": "its frequencies change with the length, so that a cache holds keys of others than later queries. Take "
    "yarn",
}
_PLACE = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
"""Keys that stand beside any scaling."""
_LONGEST = (1 << 31) - 1
"""Most positions: what convert/ takes as a size."""
_ORIGINAL = "original_max_position_embeddings"
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "finetuned",  # a note of YaRN's first models, which nothing reads
    ),
}


def rope_type_of(rope: Mapping[str, Any], where: str) -> str:
    """The kind of scaling, by transformers' key `rope_type` or the older `type`. Raises ConfigError: no string."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise ConfigError(f"{where}.rope_type must be a string, got {shown(kind)}.")
    return kind


def rope_settings(rope: Mapping[str, Any], length: int, where: str = "rope_scaling") -> dict[str, Any]:
    """Fields of ModelConfig, other than the base, that a rope_scaling object of transformers sets.

    Args:
        rope: the object; what it leaves out takes transformers' defaults.
        length: max_position_embeddings beside it.
        where: names the object in errors.

    Returns:
        fields by name, complete but for defaults, with max_position_embeddings: the longest sequence. That is as
        vLLM derives it: factor * length with linear; factor * original length with yarn, whichever of the two lengths
        a publisher's `length` is, but no less than `length`; else `length`.

    Raises:
        ConfigError: naming the key and its value.
    """
    kind = rope_type_of(rope, where)
    if kind not in _KEYS:
        reason = _REFUSED.get(kind, f"known: {', '.join(_KEYS)}")
        raise ConfigError(f"{where}={shown(kind)} is not supported: {reason}. Or remove it if it was not trained with.")
    for key, value in rope.items():
        if key not in _PLACE and key not in _KEYS[kind]:
            raise ConfigError(
                f"{where}.{key}={shown(value)} is not supported with {kind} ({', '.join((*_PLACE, *_KEYS[kind]))})."
            )
    if kind == "default":
        return {"max_position_embeddings": length}
    factor, original = _number(rope, "factor", where), rope.get(_ORIGINAL, length)
    if factor < 1:
        raise ConfigError(f"{where}.factor={factor} must be at least 1.")
    if type(original) is not int or not 1 <= original <= _LONGEST:
        raise ConfigError(f"{where}.{_ORIGINAL} must be a whole number from 1 to {_LONGEST}, got {shown(original)}.")
    unscaled = length if kind == "linear" else original  # the other kinds' length may be the scaled one already
    if factor * unscaled > _LONGEST:
        raise ConfigError(f"{where}.factor={factor} of {unscaled} tokens is more than {_LONGEST}.")
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": factor, "max_position_embeddings": int(length * factor)}
    if kind == "llama3":
        return {
            "rope_scaling_factor": factor,
            "rope_scaling_low_freq_factor": _number(rope, "low_freq_factor", where),
            "rope_scaling_high_freq_factor": _number(rope, "high_freq_factor", where),
            "rope_scaling_original_max_position_embeddings": original,
            "max_position_embeddings": length,
        }
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        **_yarn_options(rope, where),
        "max_position_embeddings": max(length, int(factor * original)),
    }


def _number(rope: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = rope.get(key)
    if default is not None and value in (None, 0):  # transformers takes both for its default
        return default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value)
    except OverflowError:  # of a whole number
        pass
    raise ConfigError(f"{where}.{key} must be a number above 0, got {shown(value)}.")


def _yarn_options(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{where}.truncate must be true or false, got {shown(truncate)}.")
    names = ["attention_factor"] if rope.get("attention_factor") is not None else []
    if rope.get("mscale") and rope.get("mscale_all_dim"):  # transformers ignores one without the other
        names += ["mscale", "mscale_all_dim"]
    return {
        "yarn_beta_fast": _number(rope, "beta_fast", where, 32.0),
        "yarn_beta_slow": _number(rope, "beta_slow", where, 1.0),
        "yarn_correction_range_round_to_int": truncate,
        **{f"yarn_{name}": _number(rope, name, where) for name in names},
    }


def rope_scaling_of(model: ModelConfig) -> dict[str, Any]:
    """The inverse of rope_settings: the scaling as transformers' rope_scaling object, without rope_theta."""
    kind = model.rope_type
    out: dict[str, Any] = {"rope_type": kind}
    if kind == "linear":
        out["factor"] = model.rotary_seq_len_interpolation_factor
    elif kind == "llama3":
        out |= {
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_scaling_low_freq_factor,
            "high_freq_factor": model.rope_scaling_high_freq_factor,
            _ORIGINAL: model.rope_scaling_original_max_position_embeddings,
        }
    elif kind == "yarn":
        out |= {
            "factor": model.yarn_rotary_scaling_factor,
            _ORIGINAL: model.yarn_original_max_position_embeddings,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "truncate": model.yarn_correction_range_round_to_int,
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if (value := getattr(model, f"yarn_{name}")) is not None:
                out[name] = value
    return out


def length_before_scaling(model: ModelConfig) -> int:
    """Longest sequence without the model's scaling: YaRN's original length, a share with linear scaling, else
    max_position_embeddings. With linear scaling it is what config.json states."""
    if model.yarn_original_max_position_embeddings is not None:
        return model.yarn_original_max_position_embeddings
    return math.ceil(model.max_position_embeddings / (model.rotary_seq_len_interpolation_factor or 1.0))


def with_rope_scaling(
    model: ModelConfig,
    scaling: Mapping[str, Any] | None = None,
    *,
    rotary_base: float | None = None,
    max_position_embeddings: int | None = None,
) -> ModelConfig:
    """A model whose rotary embedding is scaled otherwise, e.g. by YaRN for prompts beyond its training.

    Args:
        model: the model as its checkpoint says it.
        scaling: transformers' rope_scaling object, instead of the model's own; `{"rope_type": "default"}` takes the
            model's away. original_max_position_embeddings is by default the model's longest sequence before any
            scaling of its own. None: the model's scaling stays.
        rotary_base: another base; None: rope_theta of `scaling`, or the model's.
        max_position_embeddings: longest sequence in tokens, where it shall not be the one that follows from `scaling`
            (factor * original length with yarn, linear and llama3).

    Raises:
        ConfigError: naming the key and its value.
    """
    changes: dict[str, Any] = {}
    if scaling is not None:
        before = length_before_scaling(model)
        own = {field.name: field.default for field in fields(RotaryConfig) if field.name not in _KEPT}
        changes = own | rope_settings(scaling, before)
        if changes["rope_scaling_factor"] is not None:  # of no length of its own: Llama 3.2 goes beyond factor * 8192
            original = changes["rope_scaling_original_max_position_embeddings"]
            changes["max_position_embeddings"] = max(before, int(changes["rope_scaling_factor"] * original))
        share = scaling.get("partial_rotary_factor", model.rotary_percent)
        if share != model.rotary_percent:
            raise ConfigError(
                f"rope_scaling.partial_rotary_factor={shown(share)}: the weights turn {model.rotary_percent}. "
                "Remove it."
            )
        theta = scaling.get("rope_theta")
        if theta is not None:
            theta = _number(scaling, "rope_theta", "rope_scaling")
            if rotary_base not in (None, theta):
                raise ConfigError(f"rope_scaling.rope_theta={theta} and rotary_base={rotary_base} differ. Keep one.")
            rotary_base = theta
    if rotary_base is not None:
        changes["rotary_base"] = rotary_base
    if max_position_embeddings is not None:
        changes["max_position_embeddings"] = max_position_embeddings
    return replace(model, **changes)


_KEPT = ("rotary_base", "rotary_percent", "rotary_interleaved")
"""Rotary settings that are no scaling."""


def rope_scaling_json(text: str) -> dict[str, Any]:
    """`type=` of an argparse flag `--rope-scaling JSON`, e.g. '{"rope_type": "yarn", "factor": 4.0}'.

    Raises:
        argparse.ArgumentTypeError: no JSON object, or one that rope_settings refuses.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{shown(text)} is no JSON object. Example: {{"rope_type": "yarn", "factor": 4.0, "{_ORIGINAL}": 32768}}'
        )
    if not {"rope_type", "type"} & value.keys():
        raise argparse.ArgumentTypeError(f"{shown(text)} names no rope_type. Choose one of {', '.join(_KEYS)}.")
    try:
        with_rope_scaling(ModelConfig(), {key: one for key, one in value.items() if key != "partial_rotary_factor"})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value
