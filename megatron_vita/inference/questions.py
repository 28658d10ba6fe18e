"""Questions with reference answers, from JSONL files in Long-VITA's messages form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.data.media import safe_path
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Sample, Text, Video
from megatron_vita.errors import ConfigError, DataError

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_MEDIA_KEYS = ("messages", "images", "videos")


@dataclass(frozen=True, slots=True)
class Question:
    """One line of an evaluation file."""

    sample: Sample
    """The conversation up to the last user turn."""
    expected: str
    """The last assistant turn: the reference answer."""
    line: int
    """Line in the file, from 1."""
    fields: Mapping[str, Any]
    """What else the record says (`frames`, `depth`, ...)."""


def read_questions(path: Path, *, media_root: Path | None = None, limit: int | None = None) -> list[Question]:
    """Read a file of questions; no medium is opened yet, but each must exist.

    Args:
        path: JSONL; empty lines are passed over.
        media_root: folder of the media; by default the file's own. Nothing outside it is read.
        limit: only the first so many lines.

    Raises:
        ConfigError: no such file, or no question in it.
        DataError: naming file and line, where a record is not of that form or a medium is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Check --data.")
    questions = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if limit is not None and number > limit:
                break
            if text.strip():
                try:
                    questions.append(_question(text, path, media_root or path.parent, number))
                except DataError as error:
                    raise DataError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise ConfigError(f"{path}: no questions in it. Check --data and --limit.")
    return questions


def _question(text: str, path: Path, root: Path, number: int) -> Question:
    try:
        record = json.loads(text)
        talk = [(_ROLES[turn["role"]], turn["content"]) for turn in record["messages"]]
        media = {key: [safe_path(root, name) for name in record.get(key) or ()] for key in ("images", "videos")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a record of messages ({error!r})") from None
    if len(talk) < 2 or talk[-1][0] != "assistant" or not all(isinstance(content, str) for _, content in talk):
        raise DataError("the last turn must be the assistant's: it is the reference answer")
    counts = {"image": 0, "video": 0}
    messages = tuple(
        Message(role, _parts(content, counts) if role == "user" else (Text(content),))  # type: ignore[arg-type]
        for role, content in talk[:-1]
    )
    sample = Sample(
        messages=messages,
        images=tuple(MediaFile(path=str(one)) for one in media["images"]),
        videos=tuple(MediaFile(path=str(one)) for one in media["videos"]),
        source=path.stem,
        line=number,
    )
    sample.check()
    fields = {key: value for key, value in record.items() if key not in _MEDIA_KEYS}
    return Question(sample, talk[-1][1], number, fields)


def _parts(content: str, counts: dict[str, int]) -> tuple[Part, ...]:
    """Text and placeholders, in order."""
    parts: list[Part] = []
    rest = content
    while rest:
        tags = ((rest.find(f"<{kind}>"), kind) for kind in counts)
        place, kind = min(((place, kind) for place, kind in tags if place >= 0), default=(len(rest), ""))
        if place:
            parts.append(Text(rest[:place]))
        if kind:
            parts.append(Image(counts[kind]) if kind == "image" else Video(counts[kind]))
            counts[kind] += 1
        rest = rest[place + len(kind) + 2 :] if kind else ""
    return tuple(parts)
