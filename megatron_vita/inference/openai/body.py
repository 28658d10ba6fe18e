"""The bytes of a body -> its JSON object, with bounded memory and named errors.

A data URL stays where it is in the bytes: only what stands around it goes through the JSON parser, so that a body of
thousands of pictures is neither copied nor holds up other threads.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections import Counter
from typing import Any

from megatron_vita.inference.openai.data_url import DataUrl
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import kind_of, shown
from megatron_vita.inference.openai.limits import Limits

MOST_DEPTH = 64
"""Objects and arrays within each other."""
_MOST_DIGITS = 40
"""Of a whole number: more than 64 bits have."""
_KEYS = ("url", "image_url", "video_url")
_DATA = re.compile(rb'"(?:image_|video_)?url"[ \t\r\n]*:[ \t\r\n]*"data:([^"\\,]{1,200}),')
"""A key and the beginning of its value. Within a JSON string no quotation mark stands without a backslash before it, so
that this is where it seems to be; or the body is no JSON, and is none either with another content of the string."""


def parse_body(raw: bytes, limits: Limits | None = None) -> dict[str, Any]:
    """Parse the body of a request.

    Args:
        raw: its bytes. The media of the result refer to them.
        limits: `json_bytes` is checked.

    Returns:
        The object. Data URLs under `url`, `image_url` and `video_url` are `DataUrl`.

    Raises:
        LimitError: more JSON than allowed.
        RequestError: no UTF-8, no JSON, no object; NaN or an infinite or enormous number; a field that is given twice;
            or nested too deep.
    """
    mark = f"data:{secrets.token_hex(16)}:"  # nobody can know it
    urls: list[DataUrl] = []
    rest: list[bytes] = []
    view, place = memoryview(raw), 0
    while (match := _DATA.search(raw, place)) is not None:
        start, end = match.start(1) - len(b"data:"), raw.find(b'"', match.end())
        if end < 0:
            break
        content: memoryview | bytes = view[match.end() : end]
        if raw.find(b"\\", match.end(), end) >= 0:  # some clients escape every slash
            content = raw[match.end() : end].replace(b"\\/", b"/")
        if isinstance(content, memoryview) or b"\\" not in content:
            rest += raw[place:start], f"{mark}{len(urls)}".encode()
            urls.append(DataUrl(match[1].decode("latin-1"), memoryview(content)))
        else:
            rest.append(raw[place:end])
        place = end

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(found)
        if len(members) != len(found):
            twice, _ = (Counter(name for name, _ in found).most_common(1))[0]
            raise RequestError(f"{shown(twice)!a} is given twice in one object.", code="invalid_json")
        for key in _KEYS:
            value = members.get(key)
            if isinstance(value, str) and value.startswith(mark):
                members[key] = urls[int(value[len(mark) :])]
        return members

    rest.append(raw[place:])
    if limits is not None:
        limits.check("json_bytes", sum(map(len, rest)), status=413)
    try:
        body = json.loads(
            b"".join(rest).decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason}.", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error.msg} in line {error.lineno}, column {error.colno} (media left out).",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be an object, not {kind_of(body)}.", code="invalid_json")
    _check_depth(body)
    return body


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested more than {MOST_DEPTH} levels deep.", code="invalid_json")


def _no_constant(name: str) -> Any:
    raise RequestError(f"the body holds {name}, which is no JSON.", code="invalid_json")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise RequestError(f"the number {shown(text)} is too large.", code="invalid_json")
    return value


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise RequestError(f"the number {shown(text)} is too large.", code="invalid_json")
    return int(text)
