"""Reads fields of a JSON object: each has a type and a range, and what is wrong is named by its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vita.inference.openai.errors import RequestError


def kind_of(value: Any) -> str:
    """JSON's name of a value's type."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), "a string")  # a data URL that still lies in the body


def wrong_type(place: str, value: Any, wanted: str) -> RequestError:
    """The error of a value of another type than its field takes."""
    return RequestError(f"{place} must be {wanted}, not {kind_of(value)}.", param=place, code="invalid_type")


_MOST_WARNINGS = 32
"""Of one request: a client could invent names of fields for ever."""
_SHOWN = 80
"""Characters of a client's value that a message repeats."""


class Unread:
    """Fields that are not read: an error where reading is strict, else a warning."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._warnings: dict[str, None] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was ignored, each once."""
        return tuple(self._warnings)

    def keys(self, value: Mapping[str, Any], known: Iterable[str], place: str) -> None:
        """Look for keys besides these whose value is not null.

        Raises:
            RequestError: strict, and there is one; it names the first.
        """
        names = set(known)
        for key, one in value.items():
            if key not in names and one is not None:
                self.field(f"{place}.{shown(key)}" if place else shown(key))

    def field(self, place: str, why: str = "this field is not supported") -> None:
        """A field that is not read.

        Raises:
            RequestError: strict; it names the field.
        """
        if self.strict:
            raise RequestError(f"{place!a}: {why}. Remove it.", param=place, code="unknown_parameter")
        self.warn(f"{place!a}: {why}; it is ignored.")

    def warn(self, message: str) -> None:
        """Something else that is not as the client may think. Numbers of list entries are left out."""
        if len(self._warnings) < _MOST_WARNINGS:
            self._warnings[re.sub(r"\[[0-9]+\]", "[]", message)] = None


def shown(value: str) -> str:
    """A client's text as it may stand in a message: not too much of it."""
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN // 2]}...{value[-_SHOWN // 4 :]}"


def text(value: Any, place: str) -> str:
    """A string of whole characters: JSON can write half of a surrogate pair.

    Raises:
        RequestError: another type, or half a character.
    """
    if not isinstance(value, str):
        raise wrong_type(place, value, "a string")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{place} holds half a character (a lone surrogate).", param=place, code="invalid_value"
        ) from None
    return value


def whole(value: Any, place: str, low: int, high: int, *, param: str | None = None) -> int:
    """A whole number within bounds.

    Raises:
        RequestError: another type, or out of bounds; it names `param`, by default the place.
    """
    if isinstance(value, float):  # "not a number" would puzzle
        raise RequestError(f"{place} must be a whole number, not {value}.", param=place, code="invalid_type")
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(place, value, "a whole number")
    if not low <= value <= high:
        raise RequestError(
            f"{place}={shown(str(value))} must lie between {low} and {high}.",
            param=param or place,
            code="invalid_value",
        )
    return value


def boolean(value: Any, place: str) -> bool:
    """True or false.

    Raises:
        RequestError: another type.
    """
    if not isinstance(value, bool):
        raise wrong_type(place, value, "a boolean")
    return value


def array(value: Any, place: str, wanted: str = "an array") -> list[Any]:
    """A list; `wanted` says what else the field takes.

    Raises:
        RequestError: another type.
    """
    if not isinstance(value, list):
        raise wrong_type(place, value, wanted)
    return value


def mapping(value: Any, place: str) -> dict[str, Any]:
    """An object.

    Raises:
        RequestError: another type.
    """
    if not isinstance(value, dict):
        raise wrong_type(place, value, "an object")
    return value
