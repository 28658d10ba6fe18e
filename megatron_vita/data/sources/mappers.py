"""Mappers convert a record's fields to turns. They open no file; media and fixes come later."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.calls import CALL_ROLES, RESULT_ROLES, read_call_text, read_calls
from megatron_vita.data.sources.draft import Draft, Frames, Kind, Turn
from megatron_vita.data.sources.marks import is_mark, turn_learnt
from megatron_vita.data.sources.parts import read_part

Fields = Mapping[str, Any]


def map_turns(record: Any, fields: Fields) -> Draft:
    """ShareGPT, LLaVA: `conversations: [{from, value}]`; keys may also be `role` and `content`."""
    return _conversation(_list(record, fields.get("list", ("conversations", "items"))), fields, ("from", "role"))


def map_messages(record: Any, fields: Fields) -> Draft:
    """Long-VITA, OpenAI: `messages: [{role, content}]`, content being text or parts; or the bare list itself."""
    if isinstance(record, list):
        turns = record
    elif isinstance(record, dict) and record.get("conversations"):
        turns = _list(record, "conversations")  # Long-VITA's rule: it wins if it is there and not empty
    else:
        turns = _list(record, fields.get("list", "messages"))
    return _conversation(turns, fields, ("role", "from"))


def _conversation(turns: list[Any], fields: Fields, role_keys: tuple[str, ...]) -> Draft:
    draft = _draft(fields)
    texts = ("value", "content") if role_keys[0] == "from" else ("content", "value")
    words = {*role_keys, *texts}
    for raw in map(_dict, turns):
        role = _text(raw, role_keys)
        content = _first(raw, texts)
        if not names.is_empty(raw.get(texts[1])) and content != raw[texts[1]]:
            raise reject("bad_record", "`value` and `content` of a turn differ; which counts?")
        turn = Turn(role, "")
        read = _add_calls(turn, raw, draft)
        if not raw.keys() <= words:
            turn.media, others = _turn_media(raw)
            read |= others
            turn.learnt = turn_learnt(raw, turn.role, draft)
            draft.sort_unread(raw, {*words, *read, *_marks(raw)}, "turn.")
        if turn.calls and (names.is_empty(content) or role in CALL_ROLES):
            turn.content = ""
        elif isinstance(content, list):
            turn.content = [read_part(part, draft) for part in content]
        else:
            turn.content = _text(raw, texts)
        draft.turns.append(turn)
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
    draft = _draft(fields)
    history = record.get(fields.get("history", "history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise reject("bad_record", "`history` must be a list of [question, answer].")
        draft.turns += _pair(_written(pair[0], "history"), _written(pair[1], "history"))
    answer = _text(record, fields.get("assistant", "output"))
    draft.turns += _pair("\n\n".join(asked), answer)
    return draft


def map_pairs_list(record: Any, fields: Fields) -> Draft:
    """the_cauldron: `texts: [{user, assistant}]`, each one more question about the same pictures."""
    draft = _draft(fields)
    asked, answered = fields.get("user", "user"), fields.get("assistant", "assistant")
    for pair in map(_dict, _list(record, fields.get("list", "texts"))):
        draft.turns += _pair(_text(pair, asked), _text(pair, answered))
        draft.turns[-1].learnt = turn_learnt(pair, "assistant", draft)
        draft.sort_unread(pair, (asked, answered, *_marks(pair)), "turn.")
    return draft


def map_str_turns(record: Any, fields: Fields) -> Draft:
    """LIMA: a list of texts, the user's first."""
    turns = _list(record, fields.get("list", "conversations"))
    if not all(isinstance(turn, str) for turn in turns):
        raise reject("bad_record", "every turn must be text.")
    return _draft(fields, [Turn(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns)])


def map_context_qa(record: Any, fields: Fields) -> Draft:
    """One long context with several questions and answers."""
    record = _dict(record)
    questions = _list(record, fields.get("questions", "questions"))
    answers = _list(record, fields.get("answers", "answers"))
    if len(questions) != len(answers) or not questions:
        raise reject("bad_record", f"{counted(len(questions), 'question')}, but {counted(len(answers), 'answer')}.")
    context = _text(record, fields.get("context", "context"))
    draft = _draft(fields)
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        asked = _written(question, "questions")
        asked = f"{context}\n\n{asked}" if number == 0 else asked
        draft.turns += _pair(asked, _written(answer, "answers"))
    return draft


def map_chatml(record: Any, fields: Fields) -> Draft:
    """One text in ChatML: `<|im_start|>role`, a newline, the turn, `<|im_end|>`, and so on."""
    text = _text(_dict(record), fields.get("chatml", "chatml"))
    turns = _CHATML.findall(text)
    if not turns or _CHATML.sub("", text).strip():
        raise reject("bad_record", "the text is not ChatML throughout.")
    return _draft(fields, [Turn(role, content) for role, content in turns])


def map_any(record: Any, fields: Fields) -> Draft:
    """Whichever of messages, context with questions and answers, pairs, or ChatML text the record holds."""
    if isinstance(record, dict):
        if isinstance(record.get("texts"), list) and record["texts"]:
            return map_pairs_list(record, fields)
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


def _draft(fields: Fields, turns: list[Turn] | None = None) -> Draft:
    ignore = fields.get("ignore", ())
    return Draft(turns or [], ignore=frozenset((ignore,) if isinstance(ignore, str) else map(str, ignore)))


def _pair(question: str, answer: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def _add_calls(turn: Turn, raw: Mapping[str, Any], draft: Draft) -> set[str]:
    """Read reasoning, function calls and results of a turn. Returns names of the fields that were read."""
    before = draft.turns[-1] if draft.turns else None
    if turn.role in CALL_ROLES:
        turn.calls = read_call_text(_text(raw, ("value", "content")))
        turn.role = "assistant"
        return set()
    turn.is_result = turn.role in RESULT_ROLES and before is not None and bool(before.calls or before.is_result)
    if turn.known_role != "assistant":
        return set()
    turn.calls, read = read_calls(raw, draft.ignore)
    for key, value in raw.items():
        if names.plain(key) in names.REASONING and key not in draft.ignore and isinstance(value, str) and value.strip():
            if turn.reasoning not in ("", value):
                raise reject("reasoning_unread", f"`{key}` and another field of the turn differ; which counts?")
            turn.reasoning = value
            read.add(key)
    return read


def _marks(turn: Mapping[str, Any]) -> list[str]:
    return [key for key, value in turn.items() if is_mark(key, value)]


def _turn_media(turn: Mapping[str, Any]) -> tuple[dict[Kind, list[Any]], set[str]]:
    """Collect the references in fields of a turn, and the names of these fields."""
    media: dict[Kind, list[Any]] = {}
    read: set[str] = set()
    for key, value in turn.items():
        name = names.plain(key)
        if not names.holds_media(name, value):
            continue
        kind: Kind = "image" if name in names.IMAGE_NAMES else "video"
        if kind in media:
            raise reject("bad_record", f"a turn holds {kind}s under several names, one of them `{key}`; which count?")
        found = names.listed(value)
        media[kind] = [Frames(tuple(found))] if name in names.FRAMES_NAMES else found
        read.add(key)
    return media, read


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
