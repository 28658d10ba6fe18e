"""The rotary embedding in a config.json: two spellings, and releases of transformers differ in which they prefer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.config.rope_scaling import length_before_scaling, rope_scaling_of, rope_settings, rope_type_of
from megatron_vita.convert.hf_config import number, optional_integer, require, section, unsupported
from megatron_vita.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding settings of a config.json."""

    base: float
    percent: float
    """Fraction of each head that is rotated."""
    scaling: Mapping[str, Any]
    """Fields of ModelConfig: of the scaling, and max_position_embeddings, the longest sequence with it."""


def read_rotary(config: Mapping[str, Any], where: str, partial: float | None, length: int) -> Rotary:
    """The rotary embedding of a config.json, from the one spelling or the other. Raises CheckpointError: nothing says
    its base, two places disagree, or it is scaled in a way that we cannot.

    Args:
        partial: share of each head that the class turns where nothing is said; none: it always turns whole heads.
        length: the config's max_position_embeddings.
    """
    bases = {} if config.get("rope_theta") is None else {"rope_theta": number(config, "rope_theta", where)}
    scalings: dict[str, Mapping[str, Any]] = {}
    shares: dict[str, float] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = section(config, key, where)
        if not rope:
            continue
        for name, inner in rope.items():
            if isinstance(inner, Mapping):
                raise unsupported(where, f"{key}.{name}", inner, "one rotary embedding for all layers")
        if rope.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = number(rope, "rope_theta", f"{where}: {key}")
        scalings[key] = _read_scaling(rope, key, config, length, where)
        if "partial_rotary_factor" in rope:
            shares[f"{key}.partial_rotary_factor"] = _share(rope, f"{where}: {key}", partial)
    if "partial_rotary_factor" in config:
        shares["partial_rotary_factor"] = _share(config, where, partial)
    _agree("partial_rotary_factor", shares, where)
    names = {name for one in scalings.values() for name in one}
    for name in sorted(names, key=lambda name: (name == "max_position_embeddings", name)):  # it follows from the others
        _agree(f"rotary scaling ({name})", {key: one.get(name) for key, one in scalings.items()}, where)
    if not bases:
        raise CheckpointError(
            f"{where}: names no rope_theta. Copy it from the model's publisher; there is no safe default."
        )
    _agree("rotary base", bases, where)
    return Rotary(
        next(iter(bases.values())),
        next(iter(shares.values()), partial or 1.0),
        next(iter(scalings.values()), {"max_position_embeddings": length}),
    )


def write_rotary(model: ModelConfig, *, partial: bool) -> dict[str, Any]:
    """The settings of a config.json in every spelling: releases differ in which they read, and with none fall back to a
    base of 1e4 in silence.

    Args:
        partial: the class knows partial_rotary_factor.
    """
    share = {"partial_rotary_factor": model.rotary_percent} if partial else {}
    rope = {**rope_scaling_of(model), "rope_theta": model.rotary_base, **share}
    linear = model.rope_type == "linear"
    return {
        "max_position_embeddings": length_before_scaling(model) if linear else model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        **share,
        "rope_parameters": rope,
        **({} if model.rope_type == "default" else {"rope_scaling": rope}),
    }


def _share(values: Mapping[str, Any], where: str, partial: float | None) -> float:
    if partial is None:
        require(values, "partial_rotary_factor", 1.0, 1.0, where)
    return number(values, "partial_rotary_factor", where)


def _read_scaling(
    rope: Mapping[str, Any], key: str, config: Mapping[str, Any], length: int, where: str
) -> Mapping[str, Any]:
    """Fields of ModelConfig, see rope_settings."""
    try:
        if rope_type_of(rope, key) == "dynamic":  # InternVL3's
            log.warning(
                "%s: %s 'dynamic' scales nothing up to max_position_embeddings=%s tokens, and is taken for none. "
                "Longer sequences, which it would scale, are refused",
                where,
                key,
                length,
            )
            return {"max_position_embeddings": length}
        outer = optional_integer(config, _ORIGINAL, where)  # Phi's place; transformers prefers it
        if outer is not None:
            inner = optional_integer(rope, _ORIGINAL, f"{where}: {key}") or outer
            _agree(_ORIGINAL, {_ORIGINAL: outer, f"{key}.{_ORIGINAL}": inner}, where)
            if rope_type_of(rope, key) in ("llama3", "yarn"):
                rope = {**rope, _ORIGINAL: outer}
        return rope_settings(rope, length, key)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _agree(what: str, values: Mapping[str, Any], where: str) -> None:
    """Reject a setting whose values differ between the two spellings, of which releases prefer different ones."""
    if len(set(values.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in values.items())
        raise CheckpointError(f"{where}: says its {what} differently ({said}). Keep the one it was trained with.")
