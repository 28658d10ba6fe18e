"""JSON files of a Hugging Face folder: what is missing, mistyped or unsupported is rejected by name."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError

_MAX_BYTES = 100 << 20
"""Maximum size of a JSON file, three times the largest published one (a tokenizer's)."""
_LARGEST = (1 << 31) - 1
"""Maximum value of a size setting, far above published ones."""
MOST_HEADS = 1 << 10
"""Maximum number of heads of a layer; the largest published models have 128. Each takes three slices in a rule."""
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 2, 100, 40, 40


def parse_json(text: str) -> Any:
    """Parse JSON, rejecting duplicate keys: of two values, another reader may take the other one. Raises ValueError:
    the text is not JSON, has a duplicate key, or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError: no such file, or no JSON object."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB, which is no settings file.")
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Give a complete Hugging Face folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object. Download it again.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object in the layout that publishers use."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def integer(config: Mapping[str, Any], key: str, where: str, *, most: int = _LARGEST) -> int:
    """A required size: an integer from 1 to `most`."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise mistyped(where, key, f"a whole number from 1 to {most}", value)
    return value


def optional_integer(config: Mapping[str, Any], key: str, where: str, *, most: int = _LARGEST) -> int | None:
    """An optional size; none if it is missing or null."""
    return None if config.get(key) is None else integer(config, key, where, most=most)


def number(config: Mapping[str, Any], key: str, where: str) -> float:
    """A required finite number above 0."""
    value = config.get(key)
    try:
        # a whole number may be larger than any float
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < float(value) < math.inf:
            return float(value)
    except OverflowError:
        pass
    raise mistyped(where, key, "a number above 0", value)


def flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A boolean; the default if it is missing."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise mistyped(where, key, "true or false", value)
    return value


def string(config: Mapping[str, Any], key: str, default: str | None, where: str) -> str | None:
    """A string; the default if it is missing."""
    value = config.get(key, default)
    if value is not default and not isinstance(value, str):
        raise mistyped(where, key, "a string", value)
    return value


def strings(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of strings; empty if it is missing or null."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise mistyped(where, key, "a list of strings", value)
    return value


def choice(config: Mapping[str, Any], key: str, options: Collection[str], default: str | None, where: str) -> str:
    """One of the supported strings."""
    value = string(config, key, default, where)
    if value is None or value not in options:
        raise unsupported(where, key, value, ", ".join(options))
    return value


def section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any] | None:
    """A nested object; none if it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise mistyped(where, key, "an object", value)
    return value


def square(config: Mapping[str, Any], key: str, where: str) -> int:
    """A side length, given once or as two equal numbers."""
    value = config.get(key)
    sides: list[Any] = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(type(one) is int and 1 <= one <= _LARGEST for one in sides) or sides[0] != sides[1]:
        raise mistyped(where, key, "one side of a square", value)
    return int(sides[0])


def tower_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sizes of a vision tower, as `VisionConfig` names them; every family's config.json has the same keys."""
    return {
        "num_layers": integer(config, "num_hidden_layers", where),
        "hidden_size": integer(config, "hidden_size", where),
        "ffn_hidden_size": integer(config, "intermediate_size", where),
        "num_attention_heads": integer(config, "num_attention_heads", where, most=MOST_HEADS),
        "norm_epsilon": number(config, "layer_norm_eps", where),
        "image_size": square(config, "image_size", where),
        "patch_size": square(config, "patch_size", where),
    }


def require(config: Mapping[str, Any], key: str, wanted: Any, default: Any, where: str) -> None:
    """Reject any value but the supported one. True is not 1 here."""
    value = config.get(key, default)
    if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
        raise unsupported(where, key, value, f"{wanted!r} only")


def check_not_quantised(config: Mapping[str, Any], where: str) -> None:
    """Reject a config.json, or a part of one, with quantised weights."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise unsupported(where, key, "...", "dequantise the weights first")


def check_layers(layers: int, tensors: int, where: str, *, key: str = "num_hidden_layers") -> None:
    """Reject more layers than a folder has tensors, before a table of them all is made. Raises CheckpointError: no such
    folder can be complete."""
    if layers > tensors:
        raise CheckpointError(
            f"{where}: {key}={layers}, but the folder holds {tensors} tensors. Its config and its weights "
            "do not belong together, or the download is incomplete."
        )


def unsupported(where: str, key: str, value: Any, supported: str) -> CheckpointError:
    """The error for a feature that cannot be converted."""
    return CheckpointError(f"{where}: {key}={shown(value)} is not supported ({supported}).")


def mistyped(where: str, key: str, wanted: str, value: Any) -> CheckpointError:
    """The error for a value of the wrong type."""
    return CheckpointError(f"{where}: {key} must be {wanted}, got {shown(value)}.")


def shown(value: Any) -> str:
    """A value as text of a message; a long one is abbreviated."""
    return _short.repr(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} stands in it twice")
    return out
