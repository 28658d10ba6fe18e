"""A record becomes a Sample: map its fields, mend it, put its media in their places, prove it whole."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlparse

from megatron_vita.data.rejects import reject
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
from megatron_vita.data.sources.fixes import find_fix, unwrap
from megatron_vita.data.sources.mappers import MAPPERS, ROLES, Content, Draft
from megatron_vita.data.sources.media_store.store import MediaStore
from megatron_vita.data.sources.registry import DatasetSpec

_TAG = re.compile(r"<image>|<video>")
_MEDIA_KEYS = ("image", "images", "video", "videos")


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What a record lost on its way to a Sample: counted, so that nothing is dropped in silence."""

    cleaned: int = 0
    """Answers that lost leading line breaks."""
    dropped: int = 0
    """Turns that the fixes of its row took out."""


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
        DataError: whose message begins with a reason code.
    """
    record = unwrap(record)
    draft = MAPPERS[row.map](record, row.fields)
    if draft.text is not None:
        _no_undeclared(record, row)
        check_text(draft.text)
        return Document(draft.text, source, line), Changes()
    if isinstance(record, dict):
        draft.images += _field(record, row.image, "image", draft)
        draft.videos += _field(record, row.video, "video", draft)
    _no_undeclared(record, row)
    if row.media and not draft.images and not draft.videos:
        names = ", ".join(f"`{key}`" for key in row.image + row.video)
        raise reject("media_missing", f"every record of `{row.name}` has a picture or video in {names}; this has none.")
    turns = len(draft.turns)
    for fix in row.fix:
        find_fix(fix)(draft)
    if not draft.turns:
        raise reject("bad_order", "there is no turn, or none is left.")
    sample = Sample(
        _messages(draft),
        tuple(_media(reference, store) for reference in draft.images),
        tuple(_media(reference, store) for reference in draft.videos),
        source,
        line,
    )
    sample, cleaned = clean_answers(sample)
    sample.check()
    return sample, Changes(cleaned=cleaned, dropped=turns - len(draft.turns))


def clean_answers(sample: Sample) -> tuple[Sample, int]:
    """`clean_answer` on every answer of a Sample, and how many of them changed."""
    changed = 0
    messages = []
    for message in sample.messages:
        if message.role == "assistant" and all(isinstance(part, Text) for part in message.parts):
            joined = "".join(part.text for part in message.parts if isinstance(part, Text))
            cleaned = clean_answer(joined)
            if cleaned != joined:
                changed += 1
                message = dataclasses.replace(message, parts=(Text(cleaned),))
        messages.append(message)
    return (dataclasses.replace(sample, messages=tuple(messages)), changed) if changed else (sample, 0)


def _field(record: dict[str, Any], names: tuple[str, ...], kind: str, draft: Draft) -> list[Any]:
    """The media of one kind: those of the one field that holds any."""
    found = {key: _flatten(record[key]) for key in names if key in record}
    if found:
        draft.declared.add(kind)
    holding = [key for key, media in found.items() if media]
    for key in holding[1:]:
        if key in _MEDIA_KEYS and found[key] != found[holding[0]]:
            raise reject("bad_record", f"`{holding[0]}` and `{key}` hold different media; which count?")
    return found[holding[0]] if holding else []


def _no_undeclared(record: Any, row: DatasetSpec) -> None:
    """Media that the row does not know of must not be passed over in silence."""
    if isinstance(record, dict):
        for key in _MEDIA_KEYS:
            if key not in (*row.image, *row.video) and _flatten(record.get(key)):
                raise reject("undeclared_media", f"`{key}` holds media, but source `{row.name}` does not declare it.")


def _flatten(value: Any) -> list[Any]:
    if value is None or value in ("", []):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _messages(draft: Draft) -> tuple[Message, ...]:
    counts = {"image": 0, "video": 0}
    kinds = {kind for kind, media in (("image", draft.images), ("video", draft.videos)) if media} | draft.declared
    explicit = any(not isinstance(content, str) for _, content in draft.turns)
    if explicit:  # who writes parts does not write tags
        kinds = set()
    messages = []
    for role, content in draft.turns:
        if role not in ROLES:
            raise reject("bad_role", f"role {role!r} is not known.")
        ours = ROLES[role]
        parts = _parts(content, ours, kinds, counts)
        if ours == "system" and not any(not isinstance(p, Text) or p.text.strip() for p in parts):
            continue  # an empty system turn says nothing and is none
        messages.append(Message(ours, parts))
    for kind, media in (("image", draft.images), ("video", draft.videos)):
        if not explicit and counts[kind] != len(media):
            raise reject("media_count", f"{len(media)} {kind}s, but {counts[kind]} placeholders `<{kind}>`.")
    return tuple(messages)


def _parts(content: Content, role: str, kinds: set[str], counts: dict[str, int]) -> tuple[Part, ...]:
    """Cut text at the tags that stand for media. In an answer, and of a kind that the record has no field for, a tag is
    text."""
    if not isinstance(content, str):
        return tuple(part for part in content if not isinstance(part, Text) or part.text)
    if role == "assistant":
        return (Text(content),)
    parts: list[Part] = []
    start = 0
    for match in _TAG.finditer(content):
        kind = match.group()[1:-1]
        if kind not in kinds:
            continue
        if match.start() > start:
            parts.append(Text(content[start : match.start()]))
        parts.append(Image(counts[kind]) if kind == "image" else Video(counts[kind]))
        counts[kind] += 1
        start = match.end()
    if start < len(content) or not parts:
        parts.append(Text(content[start:]))
    return tuple(parts)


def _media(reference: Any, store: MediaStore) -> MediaFile:
    if isinstance(reference, MediaFile):  # a member of the archive that the record itself came from
        return reference
    if isinstance(reference, dict):
        if reference.get("bytes"):
            reference = reference["bytes"]
        else:
            reference = reference.get("path") or reference.get("url")
    if isinstance(reference, bytes | bytearray):
        return MediaFile(data=bytes(reference))
    if reference is None or reference == "":
        raise reject("media_missing", "a medium is null.")
    if not isinstance(reference, str):
        raise reject("bad_record", f"a medium is a path, an address or bytes, this is {type(reference).__name__}.")
    if reference.startswith("data:"):
        return MediaFile(data=_data_url(reference))
    if reference.startswith(("http://", "https://")):
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
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise reject("media_broken", "a data: address that is not base64.") from None
