"""The rotary embedding in a config.json: two spellings, and releases of transformers differ in which they prefer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import ModelConfig
from megatron_vita.config.model import LLAMA3_HIGH, LLAMA3_LENGTH, LLAMA3_LOW
from megatron_vita.convert.hf_config import number, require, section, string, unsupported
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

_LLAMA3 = {
    "low_freq_factor": LLAMA3_LOW,
    "high_freq_factor": LLAMA3_HIGH,
    "original_max_position_embeddings": LLAMA3_LENGTH,
}


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding settings of a config.json."""

    base: float
    scaling: float | None
    """Factor of Llama 3.1's, or none."""
    percent: float
    """Fraction of each head that is rotated."""


def read_rotary(config: Mapping[str, Any], where: str, partial: float | None) -> Rotary:
    """The rotary embedding of a config.json, from the one spelling or the other.

    Args:
        partial: share of each head that the class turns where nothing is said; none: it always turns whole heads.

    Raises:
        CheckpointError: nothing says its base, two places disagree, or it is scaled in a way that we cannot.
    """
    bases = {} if config.get("rope_theta") is None else {"rope_theta": number(config, "rope_theta", where)}
    factors: dict[str, float | None] = {}
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
        factors[key] = _read_scaling(rope, key, config, where)
        if "partial_rotary_factor" in rope:
            shares[f"{key}.partial_rotary_factor"] = _share(rope, f"{where}: {key}", partial)
    if "partial_rotary_factor" in config:
        shares["partial_rotary_factor"] = _share(config, where, partial)
    _agree("partial_rotary_factor", shares, where)
    _agree("rotary scaling", factors, where)
    if not bases:
        raise CheckpointError(
            f"{where}: names no rope_theta. Copy it from the model's publisher; there is no safe default."
        )
    _agree("rotary base", bases, where)
    return Rotary(
        next(iter(bases.values())), next(iter(factors.values()), None), next(iter(shares.values()), partial or 1.0)
    )


def write_rotary(model: ModelConfig, *, partial: bool) -> dict[str, Any]:
    """The settings of a config.json in every spelling: releases differ in which they read, and with none fall back to a
    base of 1e4 in silence.

    Args:
        partial: the class knows partial_rotary_factor.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_factor is not None:
        rope.update(rope_type="llama3", factor=model.rope_scaling_factor, **_LLAMA3)
    share = {"partial_rotary_factor": model.rotary_percent} if partial else {}
    return {
        "rope_theta": model.rotary_base,
        **share,
        "rope_parameters": {**rope, **share},
        **({} if model.rope_scaling_factor is None else {"rope_scaling": rope}),
    }


def _share(values: Mapping[str, Any], where: str, partial: float | None) -> float:
    if partial is None:
        require(values, "partial_rotary_factor", 1.0, 1.0, where)
    return number(values, "partial_rotary_factor", where)


def _read_scaling(rope: Mapping[str, Any], key: str, config: Mapping[str, Any], where: str) -> float | None:
    """Factor of Llama 3.1's scaling, or none where nothing is scaled."""
    kind = string(rope, "rope_type", string(rope, "type", "default", f"{where}: {key}"), f"{where}: {key}")
    if kind == "llama3":
        for name, published in _LLAMA3.items():
            require(rope, name, published, None, f"{where}: {key}")
        return number(rope, "factor", f"{where}: {key}")
    if kind == "dynamic":  # InternVL3's; transformers' formula is the identity up to max_position_embeddings
        log.warning(
            "%s: %s 'dynamic' scales nothing up to max_position_embeddings=%s tokens, and is taken for none: beyond "
            "them, this model turns as it does up to there",
            where,
            key,
            config.get("max_position_embeddings"),
        )
    elif kind != "default":
        raise unsupported(
            where, key, kind, "default, llama3 or dynamic; remove it if the weights were trained without it, as Qwen2.5"
        )
    return None


def _agree(what: str, values: Mapping[str, Any], where: str) -> None:
    """Reject a setting whose values differ between the two spellings, of which releases prefer different ones."""
    if len(set(values.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in values.items())
        raise CheckpointError(f"{where}: says its {what} differently ({said}). Keep the one it was trained with.")
