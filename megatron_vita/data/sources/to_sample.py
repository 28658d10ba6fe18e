"""Converts a record to a Sample: map its fields, repair it, place its media in the turns, check the result."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlparse

from megatron_vita.data.rejects import counted, reject
from megatron_vita.data.sample import (
    Document,
    Image,
    MediaFile,
    Message,
    Part,
    Sample,
    Text,
    Video,
    check_text,
    clean_answer,
)
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.calls import read_tools
from megatron_vita.data.sources.draft import KINDS, Bare, Draft, Frames, Kind, Turn
from megatron_vita.data.sources.fixes import find_fix, unwrap
from megatron_vita.data.sources.mappers import MAPPERS
from megatron_vita.data.sources.marks import mark_turns
from megatron_vita.data.sources.media_store.store import MediaStore
from megatron_vita.data.sources.placement import place
from megatron_vita.data.sources.record_media import gather, is_generic
from megatron_vita.data.sources.registry import DatasetSpec

_SYSTEM = ("system", "system_prompt", "system_message")
TAG_AS_TEXT = "<tag>"
_TAGS: dict[str, Kind] = {"<image>": "image", "<video>": "video"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the conversion dropped of a record, for the counts of the manifest and the report of the run."""

    cleaned: int = 0
    """Answers that lost leading line breaks, or blanks that the tokenizer would join with them."""
    dropped: int = 0
    """Turns that the fixes of its row removed."""
    tag_as_text: bool = False
    """A question spells `<image>` or `<video>`, and the record has no such medium, though others of its source may."""
    unread: frozenset[str] = frozenset()
    """Fields with words in them that nothing reads."""

    @property
    def notes(self) -> list[str]:
        """Notes that are counted and reported at the end of a run: names of unread fields, and TAG_AS_TEXT."""
        return [*self.unread, *([TAG_AS_TEXT] if self.tag_as_text else [])]


class _Read(dict[str, Any]):
    """A record that tracks which of its fields were read."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def record_to_sample(
    record: Any, row: DatasetSpec, *, store: MediaStore, source: str, line: int
) -> tuple[Sample | Document, Changes]:
    """Convert one record.

    Args:
        record: what a reader gave.
        row: how this dataset is written.
        store: finds its media.
        source: name in the mix, for messages and ledgers.
        line: record number.

    Returns:
        The Sample (checked; media paths proven to lie under the root) or Document, and what it lost on the way.

    Raises:
        DataError: whose message begins with an error code.
    """
    record = unwrap(record)
    plain_record = record if isinstance(record, dict) else {}
    seen = _Read(plain_record)
    draft = MAPPERS[row.map](seen if isinstance(record, dict) else record, row.fields)
    held, read = gather(plain_record, row, draft)
    if draft.text is None:
        draft.tools, defined = read_tools(plain_record, draft.ignore)
        read |= defined
    read |= seen.asked | mark_turns(plain_record, draft) | _add_system(plain_record, row, draft)
    draft.sort_unread(plain_record, read)
    if draft.text is not None:
        check_text(draft.text)
        return Document(draft.text, source, line), Changes(unread=frozenset(draft.unread))
    explicit = place(draft, held, generic=is_generic(row))
    if draft.spans and draft.videos:
        raise reject("video_span", f"`{draft.spans[0]}` asks for a part of a video; videos are taken whole. Cut them.")
    if row.media and not draft.images and not draft.videos:
        listed = ", ".join(f"`{key}`" for key in row.image + row.video)
        raise reject(
            "media_missing", f"every record of `{row.name}` has a picture or video in {listed}; this has none."
        )
    turns = len(draft.turns)
    for fix in row.fix:
        find_fix(fix)(draft)
    if not draft.turns:
        raise reject("bad_order", "there is no turn, or none is left.")
    messages, tags = _messages(draft, explicit)
    declared = {kind for kind, fields in (("image", row.image), ("video", row.video)) if fields}
    if tags and (declared or is_generic(row)):
        _no_medium_elsewhere(plain_record, read, tags)
    sample = Sample(
        messages,
        tuple(_media(reference, store) for reference in draft.images),
        tuple(_media(reference, store) for reference in draft.videos),
        source,
        line,
        draft.tools,
    )
    sample, cleaned = clean_answers(sample)
    if sample.is_plain:
        sample.check()
    else:  # the tokenizer's template decides (data/text/spell_out.py)
        sample.check_texts()
    return sample, Changes(
        cleaned=cleaned,
        dropped=turns - len(draft.turns),
        tag_as_text=bool(tags & declared),
        unread=frozenset(draft.unread),
    )


def clean_answers(sample: Sample, *, blanks: bool = False) -> tuple[Sample, int]:
    """`clean_answer` on every answer of a Sample, and how many of them changed."""
    changed = 0
    messages = []
    for message in sample.messages:
        if message.role == "assistant" and all(isinstance(part, Text) for part in message.parts):
            joined = "".join(part.text for part in message.parts if isinstance(part, Text))
            cleaned = clean_answer(joined, blanks=blanks)
            if cleaned != joined:
                changed += 1
                message = dataclasses.replace(message, parts=(Text(cleaned),))
        messages.append(message)
    return (dataclasses.replace(sample, messages=tuple(messages)), changed) if changed else (sample, 0)


def _no_medium_elsewhere(record: dict[str, Any], read: set[str], tags: set[Kind]) -> None:
    """Reject a record without media whose questions have placeholders and whose unread fields may hold a medium."""
    for key, value in record.items():
        where = names.find_medium(value) if key not in read else None
        if where is not None:
            tag = " or ".join(f"`<{kind}>`" for kind in sorted(tags))
            raise reject(
                "media_unread", f"a question asks for {tag}, and `{key}{where}` may be it, but nothing reads it."
            )


def _add_system(record: dict[str, Any], row: DatasetSpec, draft: Draft) -> set[str]:
    """Insert the system turn from a field, unless there is one. Returns names of the fields that were read."""
    name = row.fields.get("system")
    read: set[str] = set()
    for key in _SYSTEM if name is None else (name,):
        system = record.get(key)
        if isinstance(system, str) and system.strip() and draft.turns and key not in draft.ignore:
            first = draft.turns[0]
            if first.known_role != "system" or first.content == "":
                draft.turns.insert(0, Turn("system", system))
            if draft.turns[0].content == system:
                read.add(key)
    return read


def _messages(draft: Draft, explicit: bool) -> tuple[tuple[Message, ...], set[Kind]]:
    """(messages of the Sample, kinds of media whose tags stay text because the record has no such medium)."""
    counts: dict[Kind, int] = {"image": 0, "video": 0}
    kinds = {kind for kind in KINDS if draft.media(kind)} | draft.declared
    tags = {tag: kind for tag, kind in _TAGS.items() if kind in kinds} | {
        tag: kind for tag, (kind, _) in draft.tags.items()
    }
    messages = []
    orphans: set[Kind] = set()
    for turn in draft.turns:
        role = turn.known_role
        if role is None:
            raise reject("bad_role", f"role {turn.role!r} is not known.")
        if not isinstance(turn.content, str):
            parts = tuple(
                p for p in turn.content if not isinstance(p, Bare) and not (isinstance(p, Text) and not p.text)
            )
        elif role == "assistant" or explicit:  # who writes parts does not write tags
            parts = (Text(turn.content),)
        else:
            parts = _cut(turn.content, tags, draft, counts)
            orphans |= {kind for tag, kind in _TAGS.items() if tag in turn.content and kind not in kinds}
        if role == "system" and not any(not isinstance(part, Text) or part.text.strip() for part in parts):
            continue  # an empty system turn says nothing and is none
        messages.append(Message(role, parts, turn.learnt, turn.reasoning, turn.calls))
    for kind in KINDS:
        if not explicit and counts[kind] != len(draft.media(kind)):
            raise reject(
                "media_count",
                f"{counted(len(draft.media(kind)), kind)}, but {counted(counts[kind], 'placeholder')} `<{kind}>`.",
            )
    return tuple(messages), orphans


@lru_cache
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))


def _cut(text: str, tags: dict[str, Kind], draft: Draft, counts: dict[Kind, int]) -> tuple[Part, ...]:
    """Cut text at the tags that stand for media. A tag of a kind that the record has no field for is text."""
    if not tags or "<" not in text:
        return (Text(text),)
    parts: list[Part] = []
    start = 0
    for match in _pattern(tuple(tags)).finditer(text):
        kind = tags[match.group()]
        if match.start() > start:
            parts.append(Text(text[start : match.start()]))
        _, number = draft.tags.get(match.group(), (kind, counts[kind]))
        parts.append(Image(number) if kind == "image" else Video(number))
        counts[kind] += 1
        start = match.end()
    if start < len(text) or not parts:
        parts.append(Text(text[start:]))
    return tuple(parts)


def _media(reference: Any, store: MediaStore) -> MediaFile:
    if isinstance(reference, MediaFile):  # a member of the archive that the record itself came from
        return reference
    if isinstance(reference, Frames):
        pictures = tuple(_media(one, store) for one in reference.pictures)
        return MediaFile(label=f"{counted(len(pictures), 'frame')} from {pictures[0].name}", frames=pictures)
    if isinstance(reference, dict):
        reference = next((found for key in names.STRUCT if (found := reference.get(key))), None)
        return _media(reference, store)
    if isinstance(reference, bytes | bytearray):
        return MediaFile(data=bytes(reference))
    if reference is None or reference == "":
        raise reject("media_missing", "a medium is null.")
    if not isinstance(reference, str):
        raise reject("bad_record", f"a medium is a path, an address or bytes, this is {type(reference).__name__}.")
    if reference.startswith("data:"):
        return MediaFile(data=_data_url(reference))
    if names.is_base64(reference):
        return MediaFile(data=_base64(reference, "a medium"))
    if names.is_address(reference):
        raise reject("media_remote", f"{reference} is a web address; fetch it and give the path.")
    if reference.startswith("file://"):
        try:
            reference = unquote(urlparse(reference).path)
        except ValueError as error:
            raise reject("media_missing", f"{reference} is no file address ({error}).") from None
    return store.find(reference)


def _data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise reject("media_broken", "a data: address must be base64.")
    return _base64(body, "a data: address")


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise reject("media_broken", f"{what} that is not base64.") from None
