"""Mappers: a record's fields become turns. Media and fixes come later; a mapper opens nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Image, Part, Role, Text, Video

ROLES: dict[str, Role] = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Role as datasets write it -> ours."""

Content = str | list[Part]
"""Text in which `<image>` and `<video>` stand for media, or explicit parts in which they stand for themselves."""
Fields = Mapping[str, Any]


@dataclass
class Draft:
    """A conversation on its way to a Sample."""

    turns: list[tuple[str, Content]] = field(default_factory=list)
    """(role as the dataset writes it, content)."""
    images: list[Any] = field(default_factory=list)
    """Media references as the record holds them: path, URL, bytes, struct."""
    videos: list[Any] = field(default_factory=list)
    text: str | None = None
    """Plain text to learn as it is; then there are no turns."""
    declared: set[str] = field(default_factory=set)
    """Kinds of media (`image`, `video`) whose field the record has; a tag of another kind is plain text."""


def map_turns(record: Any, fields: Fields) -> Draft:
    """ShareGPT, LLaVA: `conversations: [{from, value}]`; keys may also be `role` and `content`."""
    turns = _list(record, fields.get("list", ("conversations", "items")))
    draft = Draft([(_text(turn, ("from", "role")), _text(turn, ("value", "content"))) for turn in map(_dict, turns)])
    system = record.get(fields.get("system", "system"))
    if isinstance(system, str) and system.strip() and draft.turns and ROLES.get(draft.turns[0][0]) != "system":
        draft.turns.insert(0, ("system", system))
    return draft


def map_messages(record: Any, fields: Fields) -> Draft:
    """Long-VITA, OpenAI: `messages: [{role, content}]`, content being text or parts; or the bare list itself."""
    if isinstance(record, list):
        turns = record
    elif isinstance(record, dict) and record.get("conversations"):
        turns = _list(record, "conversations")  # Long-VITA's rule: it wins if it is there and not empty
    else:
        turns = _list(record, fields.get("list", "messages"))
    draft = Draft()
    for turn in map(_dict, turns):
        if turn.get("tool_calls"):
            raise reject("bad_role", "tool calls are not supported.")
        role = _text(turn, ("role", "from"))
        content = _first(turn, ("content", "value"))
        if isinstance(content, list):
            draft.turns.append((role, [_openai_part(part, draft) for part in content]))
        else:
            draft.turns.append((role, _text(turn, ("content", "value"))))
    return draft


def map_pair(record: Any, fields: Fields) -> Draft:
    """Two named fields; `user` may list several, which are joined by blank lines. Alpaca's history and system count."""
    record = _dict(record)
    names = fields.get("user", ("instruction", "input"))
    names = (names,) if isinstance(names, str) else tuple(names)
    asked = [_text(record, names[0])]
    asked += [_text(record, name) for name in names[1:] if record.get(name) not in (None, "")]
    extra = fields.get("user_join_if_absent")
    if extra and record.get(extra) not in (None, "") and _text(record, extra) not in asked[0]:
        asked.append(_text(record, extra))
    draft = Draft()
    system = record.get(fields.get("system", "system"))
    if isinstance(system, str) and system.strip():
        draft.turns.append(("system", system))
    history = record.get(fields.get("history", "history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise reject("bad_record", "`history` must be a list of [question, answer].")
        draft.turns += [("user", _written(pair[0], "history")), ("assistant", _written(pair[1], "history"))]
    answer = _text(record, fields.get("assistant", "output"))
    draft.turns += [("user", "\n\n".join(asked)), ("assistant", answer)]
    return draft


def map_pairs_list(record: Any, fields: Fields) -> Draft:
    """the_cauldron: `texts: [{user, assistant}]`, each one more question about the same pictures."""
    draft = Draft()
    for pair in map(_dict, _list(record, fields.get("list", "texts"))):
        draft.turns.append(("user", _text(pair, fields.get("user", "user"))))
        draft.turns.append(("assistant", _text(pair, fields.get("assistant", "assistant"))))
    return draft


def map_str_turns(record: Any, fields: Fields) -> Draft:
    """LIMA: a list of texts, the user's first."""
    turns = _list(record, fields.get("list", "conversations"))
    if not all(isinstance(turn, str) for turn in turns):
        raise reject("bad_record", "every turn must be text.")
    return Draft([(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns)])


def map_context_qa(record: Any, fields: Fields) -> Draft:
    """One long context with several questions and answers."""
    record = _dict(record)
    questions = _list(record, fields.get("questions", "questions"))
    answers = _list(record, fields.get("answers", "answers"))
    if len(questions) != len(answers) or not questions:
        raise reject("bad_record", f"{len(questions)} questions, but {len(answers)} answers.")
    context = _text(record, fields.get("context", "context"))
    draft = Draft()
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        asked = _written(question, "questions")
        asked = f"{context}\n\n{asked}" if number == 0 else asked
        draft.turns += [("user", asked), ("assistant", _written(answer, "answers"))]
    return draft


def map_chatml(record: Any, fields: Fields) -> Draft:
    """One text in ChatML: `<|im_start|>role`, a newline, the turn, `<|im_end|>`, and so on."""
    text = _text(_dict(record), fields.get("chatml", "chatml"))
    turns = _CHATML.findall(text)
    if not turns or _CHATML.sub("", text).strip():
        raise reject("bad_record", "the text is not ChatML throughout.")
    return Draft([(role, content) for role, content in turns])


def map_any(record: Any, fields: Fields) -> Draft:
    """Whichever of messages, context with questions and answers, or ChatML text the record holds."""
    if isinstance(record, dict):
        if isinstance(record.get("questions"), list):
            return map_context_qa(record, fields)
        if isinstance(_first(record, fields.get("chatml", "chatml")), str):
            return map_chatml(record, fields)
    return map_messages(record, fields)


def map_text(record: Any, fields: Fields) -> Draft:
    """Plain text for language modelling."""
    return Draft(text=_text(_dict(record), fields.get("text", "text")))


MAPPERS: dict[str, Callable[[Any, Fields], Draft]] = {
    "turns": map_turns,
    "messages": map_messages,
    "pair": map_pair,
    "pairs_list": map_pairs_list,
    "str_turns": map_str_turns,
    "context_qa": map_context_qa,
    "chatml": map_chatml,
    "any": map_any,
    "text": map_text,
}

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n?", re.DOTALL)
_PART_KEYS = {
    "image_url": ("image_url", "url"),
    "input_image": ("image_url", "url"),
    "image": ("image", "image_url", "url", "path"),
    "video": ("video", "video_url", "url", "path"),
    "video_url": ("video_url", "url"),
}


def _openai_part(part: Any, draft: Draft) -> Part:
    if isinstance(part, str):
        return Text(part)
    part = _dict(part)
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return Text(_text(part, "text"))
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise reject("bad_record", f"a part of type {kind!r} is not supported.")
    reference = _first(part, _PART_KEYS[kind])
    if isinstance(reference, dict) and reference.get("url") is not None:
        reference = reference["url"]
    if kind.startswith("video"):
        draft.videos.append(reference)
        return Video(len(draft.videos) - 1)
    draft.images.append(reference)
    return Image(len(draft.images) - 1)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise reject("bad_record", f"an object was expected, found {type(value).__name__}.")
    return value


def _first(record: Mapping[str, Any], names: str | tuple[str, ...] | list[str]) -> Any:
    for name in (names,) if isinstance(names, str) else names:
        if record.get(name) is not None:
            return record[name]
    return None


def _list(record: Any, names: Any) -> list[Any]:
    value = _first(_dict(record), names)
    if not isinstance(value, list):
        raise reject("bad_record", f"`{names if isinstance(names, str) else names[0]}` must be a list.")
    return value


def _text(record: Mapping[str, Any], names: Any) -> str:
    """A text field; numbers and truth values are written out, as some datasets store short answers that way."""
    return _written(_first(record, names), names if isinstance(names, str) else names[0])


def _written(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):  # a table's NaN is no text, but the lack of one
        return str(int(value)) if value.is_integer() else str(value)
    raise reject("bad_record", f"`{name}` must be text, found {'nothing' if value is None else type(value).__name__}.")
