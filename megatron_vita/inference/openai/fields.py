"""Reads fields of a JSON object: each has a type and a range, and what is wrong is named by its place."""

from __future__ import annotations

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
    return "null" if value is None else names.get(type(value), type(value).__name__)


def wrong_type(place: str, value: Any, wanted: str) -> RequestError:
    """The error of a value of another type than its field takes."""
    return RequestError(f"{place} must be {wanted}, not {kind_of(value)}.", param=place, code="invalid_type")


def known_keys(value: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    """Refuse an object that has other keys than these with a value that is not null.

    Raises:
        RequestError: naming the first.
    """
    names = set(known)
    for key, one in value.items():
        if key not in names and one is not None:
            where = f"{place}.{key}" if place else key
            raise RequestError(
                f"{where!a}: this field is not supported. Remove it.", param=where, code="unknown_parameter"
            )


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
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(place, value, "a whole number")
    if not low <= value <= high:
        raise RequestError(
            f"{place}={value} must lie between {low} and {high}.", param=param or place, code="invalid_value"
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


def array(value: Any, place: str) -> list[Any]:
    """A list.

    Raises:
        RequestError: another type.
    """
    if not isinstance(value, list):
        raise wrong_type(place, value, "an array")
    return value


def mapping(value: Any, place: str) -> dict[str, Any]:
    """An object.

    Raises:
        RequestError: another type.
    """
    if not isinstance(value, dict):
        raise wrong_type(place, value, "an object")
    return value
