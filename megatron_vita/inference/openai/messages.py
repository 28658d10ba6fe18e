"""OpenAI's messages -> a Sample, whose media lie below a folder or in the request itself."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vita.data.media.names import locate
from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Role, Sample, Text, Video
from megatron_vita.errors import DataError
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import array, known_keys, mapping, text, wrong_type

MAX_DATA_BYTES = 256 << 20
"""Most bytes of a picture or video within a request."""

_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_HARMLESS = ("name", "annotations")
"""Fields of a message that change no answer: who a participant is called, what an earlier answer cited."""
_EMPTY = ("tool_calls", "refusal", "function_call", "audio", "reasoning_content", "reasoning")
"""Fields of an earlier answer that servers write also where there is nothing to say; then they may stand there."""
_MEDIA = {"image_url": "image", "video_url": "video"}
"""Type of a part -> media type of its data URIs."""
_PARTS = ("text", *_MEDIA)


def conversation(messages: Any, *, media_root: Path | None, source: str, line: int) -> Sample:
    """The Sample of a request's messages. Pictures and videos are found, not opened.

    A text right behind a picture begins with a line break, as the datasets have it that a model learnt from; where the
    chat template writes one itself, it stays one.

    Args:
        messages: as OpenAI's chat completions take them: roles system (or developer), user, assistant; content a text,
            or parts `text`, `image_url`, `video_url`. A URL is a path below media_root, `file://` and such a path, or a
            data URI in base64 (`video/jpeg`: frames of one second each, separated by commas).
        media_root: folder that media paths are relative to, and that none may leave; None: no path is opened.
        source: name of the file that holds the request, for messages.
        line: its line.

    Raises:
        RequestError: what is wrong and in which field.
    """
    images: list[MediaFile] = []
    videos: list[MediaFile] = []
    turns: list[Message] = []
    if not array(messages, "messages"):
        raise RequestError("messages: there is none. End with the user's.", param="messages", code="invalid_value")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        fields = {name: one for name, one in mapping(message, place).items() if one or name not in _EMPTY}
        role = text(fields.get("role"), f"{place}.role")
        if role not in _ROLES:
            raise RequestError(
                f"{place}.role is {role!a}; there are {', '.join(_ROLES)}.", param=f"{place}.role", code="invalid_value"
            )
        known_keys(fields, ("role", "content", *_HARMLESS), place)
        parts: list[Part] = []
        content = fields.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif not isinstance(content, list):
            raise wrong_type(f"{place}.content", content, "a string or an array of parts")
        for which, part in enumerate(content):
            _append(
                parts,
                mapping(part, f"{place}.content[{which}]"),
                f"{place}.content[{which}]",
                media_root,
                images,
                videos,
            )
        turns.append(Message(_ROLES[role], tuple(parts)))
    sample = Sample(tuple(turns), tuple(images), tuple(videos), source=source, line=line)
    try:
        sample.check()
    except DataError as error:
        code, message = code_of(error)
        raise RequestError(message, param="messages", code=code) from None
    if sample.messages[-1].role != "user":
        raise RequestError("messages: the last one must be the user's.", param="messages", code="bad_order")
    return sample


def _append(
    parts: list[Part], part: Mapping[str, Any], place: str, media_root: Path | None,
    images: list[MediaFile], videos: list[MediaFile],
) -> None:  # fmt: skip
    kind = text(part.get("type"), f"{place}.type")
    if kind not in _PARTS:
        raise RequestError(
            f"{place}.type is {kind!a}, which is not supported; there are {', '.join(_PARTS)}.",
            param=f"{place}.type",
            code="unsupported_content",
        )
    known_keys(part, ("type", kind), place)
    if kind == "text":
        words = text(part.get("text"), f"{place}.text")
        if parts and not isinstance(parts[-1], Text) and not words.startswith("\n"):
            words = "\n" + words
        if parts and isinstance(parts[-1], Text):
            words = parts.pop().text + words  # type: ignore[union-attr]
        parts.append(Text(words))
        return
    inside = mapping(part.get(kind), f"{place}.{kind}")
    known_keys(inside, ("url", "detail"), f"{place}.{kind}")  # the tiling is the model's: `detail` changes nothing
    where = f"{place}.{kind}.url"
    media = images if kind == "image_url" else videos
    parts.append((Image if kind == "image_url" else Video)(len(media)))
    media.append(_medium(text(inside.get("url"), where), where, _MEDIA[kind], media_root))


def _medium(url: str, place: str, kind: str, media_root: Path | None) -> MediaFile:
    """The picture or video that a URL names."""
    scheme = url[: url.index(":")].lower() if ":" in url[:12] else ""
    if scheme == "data":
        return _data(url, place, kind)
    if scheme in ("http", "https", "ftp", "s3"):
        raise RequestError(
            f"{place} is an address on the network ({scheme}); nothing is downloaded. Give a path below the media "
            "root, or a data URI.",
            param=place,
            code="media_remote",
        )
    path = url
    if scheme == "file":
        parsed = urlsplit(url)
        if parsed.netloc not in ("", "localhost"):
            raise RequestError(f"{place} names a file of another host.", param=place, code="media_remote")
        path = unquote(parsed.path)
    if media_root is None:
        raise RequestError(
            f"{place} is a path, but no folder of media is open. Set --media-root, or give a data URI.",
            param=place,
            code="media_missing",
        )
    try:
        found = locate(os.path.realpath(media_root), path)
    except DataError as error:
        code, message = code_of(error)
        raise RequestError(f"{place}: {message}", param=place, code=code) from None
    if found is None:
        raise RequestError(f"{place}: {path!a} is not there.", param=place, code="media_missing")
    return MediaFile(path=found, label=path)


def _data(url: str, place: str, kind: str) -> MediaFile:
    """The medium in a data URI (RFC 2397) in base64; `video/jpeg` holds frames, separated by commas, as vLLM has it."""
    head, comma, content = url[len("data:") :].partition(",")
    media_type, *options = head.split(";")
    if not comma or "base64" not in options:
        raise RequestError(f"{place}: the data URI is not in base64.", param=place, code="media_broken")
    if not media_type.lower().startswith(f"{kind}/"):
        raise RequestError(
            f"{place}: the data URI is of type {media_type[:40]!a}, not {kind}/...", param=place, code="media_broken"
        )
    if len(content) // 4 * 3 > MAX_DATA_BYTES:
        raise RequestError(
            f"{place}: the data URI holds more than {MAX_DATA_BYTES >> 20} MiB. Put the file below the media root.",
            param=place,
            code="media_bomb",
        )
    try:
        if media_type.lower() == "video/jpeg":
            frames = (base64.b64decode(one, validate=True) for one in content.split(","))
            return MediaFile(frames=tuple(MediaFile(data=one, label=place) for one in frames), label=place)
        return MediaFile(data=base64.b64decode(content, validate=True), label=place)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{place}: the data URI is no base64: {error}.", param=place, code="media_broken") from None
