"""What a benchmark's reader makes of a row, and the question that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.data.sample import Image, MediaFile, Message, Part, Sample, Text, Video
from megatron_vita.errors import DataError
from megatron_vita.evaluation.benchmarks.rows import Row
from megatron_vita.evaluation.pictures import spelt_list
from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks import check_gold

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A row, understood; its media not yet."""

    prompt: Sequence[str | int]
    """Texts, and numbers of media."""
    golds: tuple[str, ...]
    options: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    pictures: Any = None
    """Cell or cells that hold its pictures."""


def to_question(item: Item, media: Sequence[MediaFile], *, video: bool, task: str, source: str, line: int) -> Question:
    """The question of an item.

    Args:
        item: the row.
        media: its pictures, or its video.
        video: they are videos.
        task: judges the answer.
        source: the benchmark.
        line: number of the row.

    Raises:
        DataError: the prompt asks for a picture that is not there, or the gold answer is none of the options.
    """
    parts: list[Part] = []
    used: list[MediaFile] = []
    for piece in item.prompt:
        if isinstance(piece, str):
            last = parts[-1] if parts else None
            if isinstance(last, Text):  # one piece of text, which is tokenised together
                parts[-1] = Text(last.text + piece)
            elif piece:
                parts.append(Text(piece))
        elif piece < len(media):
            parts.append(Video(len(used)) if video else Image(len(used)))
            used.append(media[piece])
        else:
            raise DataError(f"{source}, row {line}: the question asks for picture {piece + 1} of {len(media)}.")
    files: dict[str, Any] = {"videos" if video else "images": tuple(used)}
    sample = Sample((Message("user", tuple(parts)),), source=source, line=line, **files)
    sample.check()
    question = Question(sample, item.golds[0], line, item.fields, item.golds, item.options, task)
    check_gold(question, task)
    return question


def text(row: Row, *names: str) -> str:
    """The first of these columns that the row has, as text; empty where it is missing, null or `nan`."""
    for name in names:
        value = row.get(name)
        if value is not None and value != "" and not (isinstance(value, float) and value != value):
            return "" if value == "nan" else str(value)
    return ""


def needed(row: Row, name: str) -> str:
    """A column that must not be empty.

    Raises:
        DataError: it is.
    """
    found = text(row, name)
    if not found:
        raise DataError(f"`{name}` is missing or empty; the columns are {', '.join(sorted(map(str, row)))}.")
    return found


def texts(row: Row, *names: str) -> tuple[str, ...]:
    """A list of texts, a text that spells one, or one text; empty where it is missing."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            return tuple(str(one) for one in value)
        if isinstance(value, str) and (spelt := spelt_list(value)):
            return tuple(spelt)
    one = text(row, *names)
    return (one,) if one else ()


def lettered(row: Row) -> tuple[str, ...]:
    """Options in columns A, B, ..., up to the first that is missing."""
    found = []
    for letter in LETTERS:
        option = text(row, letter)
        if not option:
            break
        found.append(option)
    return tuple(found)


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Options without the `A. ` in front, where every one has its own."""
    if all(option.startswith(f"{letter}.") for letter, option in zip(LETTERS, options, strict=False)):
        return tuple(option[2:].strip() for option in options)
    return tuple(options)


def with_fields(item: Item, **more: Any) -> Item:
    """The item with further fields."""
    return dataclasses.replace(item, fields={**item.fields, **more})
