"""Places media in the turns: at tags in questions, at explicit parts, or before the question."""

from __future__ import annotations

import re
from typing import Any

from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import Image, Part, Text, Video
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.draft import KINDS, Bare, Draft, Kind, Turn
from megatron_vita.data.sources.record_media import agreed

_NUMBERED_TAG = re.compile(r"<\|?(?:image|img)[ _]?(\d{1,4})\|?>")
_PATH_TAG = re.compile(r"<(img|image|video|audio)>([^<>\n]{1,1024})</\1>")


def place(draft: Draft, held: dict[Kind, list[Any]], *, generic: bool) -> bool:
    """Add all references to the draft, with a part or tag for each.

    Args:
        draft: turns as their mapper made them.
        held: references of the record itself.
        generic: tags may hold paths and numbers (`<img>a.png</img>`, `<image_1>`).

    Returns:
        Whether turns are made of explicit parts; then a tag in a text is text. Else tags in questions stand for media.

    Raises:
        DataError: media_count, media_unread or bad_record.
    """
    if generic:
        for turn in draft.turns:
            _read_paths(turn)
    explicit = any(
        not isinstance(part, Text) for turn in draft.turns if not isinstance(turn.content, str) for part in turn.content
    )
    for turn in draft.turns:
        if not explicit and not isinstance(turn.content, str):
            turn.content = "".join(part.text for part in turn.content if isinstance(part, Text))
    for kind in KINDS:
        own, rest = [one for turn in draft.turns for one in turn.media.get(kind, ())], held[kind]
        if own and rest:
            own, rest = agreed(own, rest, f"turns and record hold different {kind}s; which count?"), []
        for turn in draft.turns:
            count = len(turn.media.get(kind, ()))
            if count:
                _in_turn(turn, kind, own[:count], draft.media(kind), explicit)
                own = own[count:]
        _of_record(draft, kind, rest, explicit)
    if generic and not explicit and not draft.tags:
        _read_numbers(draft)
    return explicit


def _in_turn(turn: Turn, kind: Kind, references: list[Any], media: list[Any], explicit: bool) -> None:
    """Place media from fields of a turn other than its content."""
    if turn.known_role == "assistant":
        raise reject("media_unread", f"a {kind} in an answer: nothing teaches to make one.")
    numbers = range(len(media), len(media) + len(references))
    media += references
    tag = f"<{kind}>"
    if isinstance(turn.content, str):
        tags = turn.content.count(tag)
        if tags not in (0, len(references)):
            raise reject(
                "media_count",
                f"{counted(len(references), kind)} in a turn, but {counted(tags, 'placeholder')} `{tag}` in it.",
            )
        if not tags:
            turn.content = f"{tag}\n" * len(references) + turn.content
        if explicit:
            first, *texts = turn.content.split(tag)
            turn.content = [Text(first)]
            for number, text in zip(numbers, texts, strict=True):
                turn.content += [_part(kind, number), Text(text)]
        return
    bare = [part for part in turn.content if isinstance(part, Bare) and part.kind == kind]
    if bare:
        _fill([turn], kind, bare, numbers, "the turn")
    elif any(isinstance(part, Image if kind == "image" else Video) for part in turn.content):
        raise reject("bad_record", f"a turn holds {kind}s in its parts and beside them; which count?")
    else:
        turn.content = [*(_part(kind, number) for number in numbers), *turn.content]


def _of_record(draft: Draft, kind: Kind, rest: list[Any], explicit: bool) -> None:
    """Place media from fields of the record."""
    media = draft.media(kind)
    contents = [turn.content for turn in draft.turns if not isinstance(turn.content, str)]
    bare = [part for content in contents for part in content if isinstance(part, Bare) and part.kind == kind]
    if bare:
        numbers = range(len(media), len(media) + len(rest))
        media += rest
        _fill(draft.turns, kind, bare, numbers, f"`{kind}s` of the record")
    elif rest and media and explicit:
        media[:] = agreed(media, rest, f"the parts and the record's `{kind}s` hold different media; which count?")
    elif rest and explicit:
        raise reject(
            "media_count", f"{counted(len(rest), kind)} of the record, but no part of type {kind!r} stands for one."
        )
    else:
        media += rest


def _fill(turns: list[Turn], kind: Kind, bare: list[Bare], numbers: range, where: str) -> None:
    """Replace parts without a reference by the next medium, or by that of the part's index."""
    if len(bare) != len(numbers):
        raise reject(
            "media_count",
            f"{counted(len(bare), 'part')} of type {kind!r} without one, and {where} holds {len(numbers)} for them.",
        )
    said = [part.index for part in bare]
    order = [0 if index is None else index for index in said]
    if set(said) in ({None}, {0}):  # a column's default says nothing
        order = list(range(len(bare)))
    if sorted(order) != list(range(len(bare))) or (None in said and len(set(said)) > 1):
        raise reject("media_count", f"the parts of type {kind!r} say index {said}, but there are {len(bare)} of them.")
    chosen = iter(numbers[index] for index in order)
    for turn in turns:
        if not isinstance(turn.content, str):
            turn.content = [
                _part(kind, next(chosen)) if isinstance(part, Bare) and part.kind == kind else part
                for part in turn.content
            ]


def _part(kind: Kind, number: int) -> Part:
    return Image(number) if kind == "image" else Video(number)


def _read_paths(turn: Turn) -> None:
    """Replace `<img>a.png</img>` in a question (older Qwen-VL, ms-swift) by a placeholder and a reference."""
    if turn.known_role == "assistant" or not isinstance(turn.content, str) or "</" not in turn.content:
        return

    def replaced(match: re.Match[str]) -> str:
        word, path = match[1], match[2].strip()
        if not names.is_medium(path):
            return match.group()
        if word == "audio":
            raise reject("media_unread", f"{match.group()}: nothing reads audio.")
        kind: Kind = "video" if word == "video" else "image"
        turn.media.setdefault(kind, []).append(path)
        return f"<{kind}>"

    if not turn.media:
        turn.content = _PATH_TAG.sub(replaced, turn.content)


def _read_numbers(draft: Draft) -> None:
    """Register `<image_1>`, `<|image_1|>`, `<image 1>` as tags of the pictures, in records without `<image>`."""
    questions = [
        turn.content for turn in draft.turns if isinstance(turn.content, str) and turn.known_role != "assistant"
    ]
    if not draft.images or any("<image>" in text for text in questions):
        return
    tags = {match.group(): int(match[1]) for text in questions for match in _NUMBERED_TAG.finditer(text)}
    first = 0 if 0 in tags.values() else 1
    if sorted(tags.values()) == list(range(first, first + len(draft.images))):
        draft.tags.update({tag: ("image", number - first) for tag, number in tags.items()})
