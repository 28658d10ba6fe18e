"""JSON files of a Hugging Face folder: what is missing, mistyped or unsupported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Give a complete Hugging Face folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object. Download it again.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object as publishers lay it out."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def integer(config: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number that must be there."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} must be a whole number, got {value!r}.")
    return value


def number(config: Mapping[str, Any], key: str, where: str) -> float:
    """A number that must be there."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} must be a number, got {value!r}.")
    return float(value)


def square(config: Mapping[str, Any], key: str, where: str) -> int:
    """A side length, given once or as two equal numbers."""
    value = config.get(key)
    sides = value if isinstance(value, list) else [value]
    if not sides or not isinstance(sides[0], int) or any(one != sides[0] for one in sides):
        raise CheckpointError(f"{where}: {key} must be one side of a square, got {value!r}.")
    return sides[0]


def require(config: Mapping[str, Any], key: str, wanted: Any, default: Any, where: str) -> None:
    """Refuse a setting that has any value but the one that is supported."""
    value = config.get(key, default)
    if value != wanted:
        raise refuse(where, key, value, f"{wanted!r} only")


def refuse(where: str, key: str, value: Any, supported: str) -> CheckpointError:
    """The error for a feature that cannot be converted."""
    return CheckpointError(f"{where}: {key}={value!r} is not supported ({supported}).")
