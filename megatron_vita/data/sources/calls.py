"""Parses function definitions, calls and results into OpenAI's form, which chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources import fields as names

RESULT_ROLES = ("tool", "function", "observation", "ipython", "tool_response", "function_response")
"""Roles of a call's result."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of a turn that is a call (LLaMA-Factory's ShareGPT form)."""
_CALLS = ("tool_calls", "function_call", "tool_call")


def read_tools(record: Mapping[str, Any], ignore: frozenset[str]) -> tuple[str, set[str]]:
    """Parse the functions that a record defines: (JSON list or an empty text, names of the fields that were read).

    Raises:
        DataError: tools_unread, if they are in no known form.
    """
    found: list[dict[str, Any]] = []
    read: set[str] = set()
    for key, value in record.items():
        name = names.plain(str(key))
        if name not in names.TOOLS or name in _CALLS or key in ignore or names.is_nothing(value):
            continue
        value = _parsed(value, key)
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict):
                raise reject("tools_unread", f"`{key}` must define functions as objects.")
            function = _without_nulls(one)
            if "function" not in function:
                function = {"type": "function", "function": function}
            if not isinstance(function["function"], dict) or not isinstance(function["function"].get("name"), str):
                raise reject("tools_unread", f"`{key}` holds a function without a name.")
            found.append(function)
        read.add(key)
        if len(read) > 1:
            raise reject("tools_unread", f"functions are defined in {' and in '.join(sorted(read))}; which count?")
    return (json.dumps(found, ensure_ascii=False) if found else ""), read


def read_calls(turn: Mapping[str, Any], ignore: frozenset[str]) -> tuple[str, set[str]]:
    """Parse the calls of a turn: (JSON list or an empty text, names of the fields that were read).

    Raises:
        DataError: tools_unread, if they are in no known form.
    """
    calls: list[dict[str, Any]] = []
    read: set[str] = set()
    for key, value in turn.items():
        if names.plain(str(key)) in _CALLS and key not in ignore and not names.is_nothing(value):
            calls += _calls(value, key)
            read.add(key)
    return (json.dumps(calls, ensure_ascii=False) if calls else ""), read


def read_call_text(text: str) -> str:
    """Parse the text of a turn whose role is in CALL_ROLES: its calls as a JSON list."""
    return json.dumps(_calls(text, "function_call"), ensure_ascii=False)


def _calls(value: Any, key: str) -> list[dict[str, Any]]:
    value = _parsed(value, key)
    out = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function") or call if isinstance(call, dict) else {}
        arguments = call.get("arguments", call.get("parameters", {}))
        arguments = _parsed(arguments or {}, key)
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise reject("tools_unread", f"`{key}` must hold a function's `name` and its `arguments`.")
        out.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return out


def _parsed(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise reject("tools_unread", f"`{key}` is a text that is not JSON.") from None


def _without_nulls(value: Any) -> Any:
    """A value without null fields: in a parquet column, every struct has the fields of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
