"""OpenAI's messages -> a Sample, whose media lie below a folder or in the request itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import Image, MediaFile, Message, Part, Role, Sample, Text, Video
from megatron_vita.errors import DataError
from megatron_vita.inference.openai.data_url import DataUrl
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import Unread, array, mapping, shown, text, whole, wrong_type
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.inference.openai.media import Fetch, find_medium, is_address

MAX_DATA_BYTES = 256 << 20
"""Most bytes of a picture or video within a request, where no other limit is given."""
IMAGE_TOKEN = "<IMAGE_TOKEN>"
"""A picture's place in a text, as lmdeploy has it and VLMEvalKit's prompts for InternVL write it."""

_PLACE = re.compile("(?:<img>)?<IMAGE_TOKEN>(?:</img>)?")
_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_HARMLESS = ("name", "annotations")
"""Fields of a message that change no answer: who a participant is called, what an earlier answer cited."""
_EMPTY = ("tool_calls", "refusal", "function_call", "audio", "reasoning_content", "reasoning")
"""Fields of an earlier answer that servers write also where there is nothing to say; then they may stand there."""
_CALLS = ("tool_calls", "function_call")
_MEDIA = {"image_url": "image", "video_url": "video"}
"""Type of a part -> media type of its data URIs."""
_PARTS = ("text", *_MEDIA)
_TILES = "max_dynamic_patch"
"""Most tiles of a picture, as InternVL's servers call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaOptions:
    """Which media may be read, and how much of them is looked at where a part does not say."""

    media_root: Path | None = None
    """Folder that media paths are relative to, and that none may leave; None: no path is opened."""
    fetch: Fetch | None = None
    """Downloads http(s) addresses; None: they are refused."""
    limits: Limits | None = None
    max_tiles: int | None = None
    """Most tiles of a picture; None: as the model was trained."""


def conversation(messages: Any, options: MediaOptions, unread: Unread, *, source: str, line: int) -> Sample:
    """The Sample of a request's messages. Pictures and videos are found, not opened.

    A text right behind a picture begins with a line break, as the datasets have it that a model learnt from; where the
    chat template writes one itself, it stays one. Unless reading is strict, each `<IMAGE_TOKEN>` in a user's texts
    takes the next picture of the message; its pictures then do not stand where their parts do.

    Args:
        messages: as OpenAI's chat completions take them: roles system (or developer), user, assistant; content a text,
            or parts `text`, `image_url`, `video_url`. A URL is a path below the media root, `file://` and such a path,
            or a data URI in base64 (`video/jpeg`: frames of one second each, separated by commas).
        options: where media may come from, and limits.
        unread: takes fields that are not read.
        source: name of the file that holds the request, for messages.
        line: its line.

    Raises:
        RequestError: what is wrong and in which field.
    """
    if not array(messages, "messages"):
        raise RequestError("messages: there is none. End with the user's.", param="messages", code="invalid_value")
    if options.limits is not None:
        options.limits.check("messages", len(messages), param="messages")
        contents = (one.get("content") for one in messages if isinstance(one, dict))
        parts = sum(len(content) for content in contents if isinstance(content, list))
        options.limits.check("parts", parts, param="messages")
    reader = _Reader(options, unread)
    read = [reader.message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if options.limits is not None:
        reader.check(options.limits, read)
    turns = [Message(one.role, tuple(reader.parts(one))) for one in read]
    if not unread.strict:
        turns = _joined(turns, unread)
    sample = Sample(tuple(turns), tuple(reader.images), tuple(reader.videos), source=source, line=line)
    try:
        sample.check()
    except DataError as error:
        code, message = code_of(error)
        raise RequestError(message, param="messages", code=code) from None
    if sample.messages[-1].role != "user":
        raise RequestError("messages: the last one must be the user's.", param="messages", code="bad_order")
    return sample


@dataclass(frozen=True, slots=True)
class _Medium:
    """A part that is a picture or video, not decoded yet."""

    place: str
    kind: str
    url: str | DataUrl
    max_tiles: int | None


@dataclass(frozen=True, slots=True)
class _Message:
    place: str
    role: Role
    parts: list[str | _Medium]


@dataclass(slots=True)
class _Reader:
    """Reads messages twice: first what there is, then, if that is not too much, the media."""

    options: MediaOptions
    unread: Unread
    images: list[MediaFile] = field(default_factory=list)
    videos: list[MediaFile] = field(default_factory=list)
    fetched: int = 0
    """Bytes that were downloaded."""

    def message(self, message: Any, place: str) -> _Message:
        """One message."""
        fields = {name: one for name, one in mapping(message, place).items() if one or name not in _EMPTY}
        role = text(fields.get("role"), f"{place}.role")
        if role not in _ROLES:
            raise RequestError(
                f"{place}.role is {shown(role)!a}; there are {', '.join(_ROLES)}.",
                param=f"{place}.role",
                code="invalid_value",
            )
        for name in _CALLS:
            if name in fields:
                raise RequestError(
                    f"{place}.{name}: no tool can be called. Remove it.",
                    param=f"{place}.{name}",
                    code="unsupported_parameter",
                )
        self.unread.keys(fields, ("role", "content", *_HARMLESS), place)
        content = fields.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif content is None and _ROLES[role] == "assistant" and not self.unread.strict:
            content = []
        elif not isinstance(content, list):
            raise wrong_type(f"{place}.content", content, "a string or an array of parts")
        parts = [self._part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        return _Message(place, _ROLES[role], parts)

    def check(self, limits: Limits, messages: list[_Message]) -> None:
        """Refuse more than a request may hold, before anything is decoded."""
        parts = [part for message in messages for part in message.parts]
        media = [part for part in parts if isinstance(part, _Medium)]
        videos = [one.url for one in media if one.kind == "video"]
        limits.check("text_characters", sum(len(part) for part in parts if isinstance(part, str)), param="messages")
        limits.check("pictures", len(media), param="messages")
        limits.check("videos", len(videos), param="messages")
        limits.check("fetches", sum(is_address(one.url) for one in media), param="messages")
        urls = (DataUrl.parse(one) if isinstance(one, str) and one.startswith("data:") else one for one in videos)
        frames = sum(one.frames() for one in urls if isinstance(one, DataUrl))
        limits.check("frames", frames, param="messages")

    def parts(self, message: _Message) -> list[Part]:
        """Its parts, with media found or decoded."""
        texts = [part for part in message.parts if isinstance(part, str)]
        pictures = [part for part in message.parts if isinstance(part, _Medium) and part.kind == "image"]
        named = 0
        if message.role == "user" and not self.unread.strict:
            named = sum(len(_PLACE.findall(one)) for one in texts)
            if named and not pictures:
                self.unread.warn(f"{message.place} has {IMAGE_TOKEN} in a text but no picture: it stays text.")
                named = 0
            elif named and named != len(pictures):
                raise RequestError(
                    f"{message.place}: its texts name {named} places of pictures ({IMAGE_TOKEN}), but it has "
                    f"{len(pictures)}. Give each picture its place, or none.",
                    param=f"{message.place}.content",
                    code="media_count",
                )
        parts: list[Part] = []
        waiting = iter(pictures)
        for part in message.parts:
            if isinstance(part, _Medium):
                if part.kind == "video" or not named:
                    parts.append(self._found(part))
                continue
            for number, piece in enumerate(_PLACE.split(part) if named else [part]):
                if number:
                    parts.append(self._found(next(waiting)))
                if piece or not named:
                    _append_text(parts, piece)
        return parts

    def _part(self, value: Any, place: str) -> str | _Medium:
        part = mapping(value, place)
        kind = text(part.get("type"), f"{place}.type")
        if kind not in _PARTS:
            raise RequestError(
                f"{place}.type is {shown(kind)!a}, which is not supported; there are {', '.join(_PARTS)}.",
                param=f"{place}.type",
                code="unsupported_content",
            )
        beside = () if self.unread.strict or kind == "text" else ("detail", _TILES)
        self.unread.keys(part, ("type", kind, *beside), place)
        if kind == "text":
            return text(part.get("text"), f"{place}.text")
        inside = part.get(kind)
        if isinstance(inside, str | DataUrl) and not self.unread.strict:
            inside = {"url": inside}
        inside = mapping(inside, f"{place}.{kind}")
        # the tiling is the model's, or the number of tiles is given: `detail` changes nothing
        self.unread.keys(inside, ("url", "detail", *beside), f"{place}.{kind}")
        url = inside.get("url")
        if not isinstance(url, DataUrl):
            url = text(url, f"{place}.{kind}.url")
        return _Medium(f"{place}.{kind}.url", _MEDIA[kind], url, self._tiles(part, inside, place, kind))

    def _tiles(self, part: Mapping[str, Any], inside: Mapping[str, Any], place: str, kind: str) -> int | None:
        """Most tiles that a part asks for; what stands inside it goes before what stands beside it."""
        if self.unread.strict or kind != "image_url":
            return None
        most = self.options.limits.picture_tiles if self.options.limits is not None else 1 << 10
        for where, one in ((f"{place}.{kind}", inside), (place, part)):
            if one.get(_TILES) is not None:
                return whole(one[_TILES], f"{where}.{_TILES}", 1, most)
        return None

    def _found(self, part: _Medium) -> Image | Video:
        limits = self.options.limits
        most_bytes = MAX_DATA_BYTES if limits is None else limits.picture_bytes
        file = find_medium(
            part.url, part.place, part.kind, media_root=self.options.media_root, fetch=self.options.fetch,
            most_bytes=most_bytes,
        )  # fmt: skip
        if is_address(part.url):
            self.fetched += len(file.data or b"")
            if limits is not None:
                limits.check("fetched_bytes", self.fetched, param=part.place)
        if part.kind == "image":
            self.images.append(replace(file, max_tiles=part.max_tiles or self.options.max_tiles))
            return Image(len(self.images) - 1)
        self.videos.append(file)
        return Video(len(self.videos) - 1)


def _joined(turns: Sequence[Message], unread: Unread) -> list[Message]:
    """Turns that alternate: without empty answers, those of one role in a row as one, on lines of their own."""
    joined: list[Message] = []
    for number, turn in enumerate(turns, 1):
        words = (part.text if isinstance(part, Text) else "picture" for part in turn.parts)
        if turn.role == "assistant" and number < len(turns) and not "".join(words).strip():
            # a server says it where a stop string came first, and clients send it back
            unread.warn("messages: an empty answer is left out.")
            continue
        if not joined or joined[-1].role != turn.role:
            joined.append(turn)
            continue
        unread.warn("messages: turns of one role in a row are read as one turn, on lines of their own.")
        parts = list(joined[-1].parts)
        for place, part in enumerate(turn.parts):
            if isinstance(part, Text):
                _append_text(parts, part.text if place else "\n" + part.text)
            else:
                parts.append(part)
        joined[-1] = Message(turn.role, tuple(parts))
    return joined


def _append_text(parts: list[Part], words: str) -> None:
    if parts and not isinstance(parts[-1], Text) and not words.startswith("\n"):
        words = "\n" + words
    if parts and isinstance(parts[-1], Text):
        words = parts.pop().text + words  # type: ignore[union-attr]
    parts.append(Text(words))
