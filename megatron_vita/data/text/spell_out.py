"""Converts functions, calls, results and reasoning to text as the chat template writes them.

The template is asked: it renders the conversation with all of that, the rendering is read back as turns of plain text,
and these must render the same. So training sees the ids that stock code makes of the conversation, and labels lie on
all that the model would have to write: reasoning, answer and calls.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Image, Message, Part, Sample, Text, Video
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError

_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>\n", re.DOTALL)
_MARK = re.compile("\ue000(\\d+):(\\w+)\ue001|<IMG_CONTEXT>\n|<video>\n")


def spell_out(sample: Sample, tokenizer: VitaTokenizer) -> Sample:
    """Convert a Sample to plain turns; one that has only such is returned as it is.

    Raises:
        DataError: tools_unread or reasoning_unread, if the template leaves any of it out or writes it in a form that
            plain turns cannot take.
    """
    if sample.is_plain:
        return sample
    code = (
        "tools_unread"
        if sample.tools or any(m.calls or m.role == "tool" for m in sample.messages)
        else "reasoning_unread"
    )
    whole = _render_sample(sample, tokenizer, code)
    for candidate in dict.fromkeys((sample, _without_line_breaks(sample))):  # which some templates strip
        spelt = _spell_out(candidate, tokenizer, code)
        if _render_sample(spelt, tokenizer, code) == whole:
            return spelt
    raise reject(code, f"{sample.id}: the tokenizer's chat template changes its words, by their blanks for instance.")


def _spell_out(sample: Sample, tokenizer: VitaTokenizer, code: str) -> Sample:
    tools = json.loads(sample.tools) if sample.tools else None
    messages = [_stock(number, message) for number, message in enumerate(sample.messages)]
    calls = [json.loads(message.calls) for message in sample.messages if message.calls]
    said = list(_leaves([[one["function"] for one in some] for some in (tools or [], *calls)]))
    for token in tokenizer.special_tokens:
        if any(token in text for text in said):
            raise reject(code, f"{sample.id}: its functions or calls spell the special token {token}.")
    rendered = _render(tokenizer, messages, tools, code, sample.id)
    marks = [match.group() for match in _MARK.finditer(rendered)]
    wanted = [mark for number, message in enumerate(sample.messages) for mark in _marks(number, message)]
    if marks != wanted or not all(
        text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered for text in said
    ):
        raise reject(code, f"{sample.id}: the tokenizer's chat template leaves out functions, calls or reasoning.")
    turns = _TURN.findall(rendered)
    if "".join(f"<|im_start|>{role}\n{body}<|im_end|>\n" for role, body in turns) != rendered:
        raise reject(code, f"{sample.id}: the chat template writes them in another form than turns.")
    learnt = iter([message.learnt for message in sample.messages if message.role == "assistant"])
    plain: list[Message] = []
    again: list[dict[str, Any]] = []
    for role, body in turns:
        pieces = list(_pieces(body))
        if any(token in piece for token in tokenizer.special_tokens for piece in pieces if not _MARK.fullmatch(piece)):
            raise reject(code, f"{sample.id}: the chat template writes them with special tokens inside a turn.")
        plain.append(Message(role, tuple(_parts(pieces, sample)), role != "assistant" or next(learnt, True)))
        again.append({"role": role, "content": _content(pieces)})
    if _render(tokenizer, again, None, code, sample.id) != rendered:
        raise reject(code, f"{sample.id}: the chat template writes plain turns of the same words in another way.")
    spelt = dataclasses.replace(sample, messages=tuple(plain), tools="")
    spelt.check()
    return spelt


def _without_line_breaks(sample: Sample) -> Sample:
    """The Sample without line breaks around reasoning and before answers."""
    messages = []
    for message in sample.messages:
        parts = message.parts
        if message.role == "assistant" and parts and isinstance(parts[0], Text):
            parts = (Text(parts[0].text.lstrip("\n")), *parts[1:])
        messages.append(dataclasses.replace(message, parts=parts, reasoning=message.reasoning.strip("\n")))
    return dataclasses.replace(sample, messages=tuple(messages))


def _render_sample(sample: Sample, tokenizer: VitaTokenizer, code: str) -> str:
    """The Sample as stock code renders it, its own words in their places."""
    messages = []
    for number, message in enumerate(sample.messages):
        pieces = [_words(mark, message) for mark in _marks(number, message) if not mark.endswith(":r\ue001")]
        reasoning = {"reasoning_content": message.reasoning} if message.reasoning else {}
        messages.append({**_stock(number, message), "content": _content(pieces), **reasoning})
    tools = json.loads(sample.tools) if sample.tools else None
    return _render(tokenizer, messages, tools, code, sample.id)


def _words(mark: str, message: Message) -> str:
    match = _MARK.fullmatch(mark)
    return mark if match is None or match[1] is None else _text(message, match[2])


def _render(tokenizer: VitaTokenizer, messages: list[dict[str, Any]], tools: Any, code: str, where: str) -> str:
    try:
        return tokenizer.template.render(messages, False, tools=tools)
    except ConfigError as error:
        raise reject(code, f"{where}: {error}") from None


def _stock(number: int, message: Message) -> dict[str, Any]:
    """A message in transformers' form, with a mark for each text."""
    marks = [mark for mark in _marks(number, message) if not mark.endswith(":r\ue001")]
    stock: dict[str, Any] = {"role": message.role, "content": _content(marks)}
    if message.reasoning:
        stock["reasoning_content"] = f"\ue000{number}:r\ue001"
    if message.calls:
        stock["tool_calls"] = json.loads(message.calls)
    return stock


def _marks(number: int, message: Message) -> list[str]:
    """The marks of a message's reasoning and parts, in order."""
    out = [f"\ue000{number}:r\ue001"] if message.reasoning else []
    for place, part in enumerate(message.parts):
        if isinstance(part, Text):
            out += [f"\ue000{number}:{place}\ue001"] if part.text else []
        else:
            out.append("<IMG_CONTEXT>\n" if isinstance(part, Image) else "<video>\n")
    return out


def _content(pieces: list[str]) -> Any:
    """Pieces as the content of a message in transformers' form."""
    kinds = {"<IMG_CONTEXT>\n": "image", "<video>\n": "video"}
    if not any(piece in kinds for piece in pieces):
        return "".join(pieces)
    return [{"type": kinds[one]} if one in kinds else {"type": "text", "text": one} for one in pieces]


def _pieces(body: str) -> Iterator[str]:
    """A turn's body cut into marks and the template's own words."""
    at = 0
    for match in _MARK.finditer(body):
        if match.start() > at:
            yield body[at : match.start()]
        yield match.group()
        at = match.end()
    if at < len(body):
        yield body[at:]


def _parts(pieces: list[str], sample: Sample) -> list[Part]:
    parts: list[Part] = []
    media = {
        kind: iter([p for m in sample.messages for p in m.parts if isinstance(p, kind)]) for kind in (Image, Video)
    }
    for piece in pieces:
        match = _MARK.fullmatch(piece)
        if match is None or match[1] is not None:
            text = piece if match is None else _text(sample.messages[int(match[1])], match[2])
            if parts and isinstance(parts[-1], Text):
                text = parts.pop().text + text  # type: ignore[union-attr]
            parts.append(Text(text))
        else:
            parts.append(next(media[Image if piece.startswith("<IMG") else Video]))
    return parts


def _text(message: Message, which: str) -> str:
    if which == "r":
        return message.reasoning
    part = message.parts[int(which)]
    assert isinstance(part, Text)
    return part.text


def _leaves(value: Any, named: bool = False) -> Iterator[str]:
    """Every text and number in a value, and the names of parameters and arguments."""
    if isinstance(value, dict):
        for key, one in value.items():
            if named:
                yield key
            yield from _leaves(one, key in ("properties", "arguments"))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)
