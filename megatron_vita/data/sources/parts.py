"""Reads content parts in the forms of OpenAI, Anthropic, Qwen and transformers."""

from __future__ import annotations

from typing import Any

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Image, Part, Text, Video
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.draft import Bare, Draft, Frames, Kind

_TEXTS = ("text", "input_text", "output_text")
_KINDS: dict[str, Kind] = {
    "image": "image", "image_url": "image", "input_image": "image", "img": "image", "picture": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_WHERE = ("source", *names.STRUCT)
_TOOLS = ("tool_use", "tool_result", "tool_call", "function_call", "function", "tool")
_REASONING = ("thinking", "redacted_thinking", "reasoning")
_UNREAD = ("audio", "audio_url", "input_audio", "file", "input_file", "document", "image_file", "pdf", "point_cloud")
_READ = ("type", "text", "index", "media_type", "mime_type", "detail")


def read_part(part: Any, draft: Draft) -> Part | Bare:
    """Read one part and add its medium to the draft; a part without a reference becomes `Bare`.

    Raises:
        DataError: bad_record; media_unread, tools_unread or reasoning_unread.
    """
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise reject("bad_record", f"a part of content is an object or text, found {type(part).__name__}.")
    kind = part.get("type")
    if kind is None:  # Qwen: {"image": ...}, {"text": ...}
        kind = next((key for key in ("image", "video", "image_url", "video_url", "text") if _says(part.get(key))), None)
    if kind in _TEXTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise reject("bad_record", f"a part of text must hold text, found {type(text).__name__}.")
        draft.sort_unread(part, (*_READ,), "content.")
        return Text(text)
    if kind in _TOOLS:
        raise reject("tools_unread", f"a part of type {kind!r}: nothing teaches calls of functions.")
    if kind in _REASONING:
        raise reject("reasoning_unread", f"a part of type {kind!r}: the chat template has no place for it.")
    if kind in _UNREAD or (isinstance(kind, str) and names.plain(kind) in names.UNREAD_MEDIA):
        raise reject("media_unread", f"a part of type {kind!r}: nothing reads it.")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise reject("bad_record", f"a part of type {kind!r} is not supported.")
    return _medium(part, _KINDS[kind], draft)


def _medium(part: dict[str, Any], kind: Kind, draft: Draft) -> Image | Video | Bare:
    known = names.IMAGE_NAMES if kind == "image" else (*names.VIDEO_NAMES, *names.FRAMES_NAMES)
    holding = [key for key in part if (names.plain(key) in known or key in _WHERE) and _says(part[key])]
    draft.sort_unread(part, (*_READ, *holding), "content.")
    if not holding:
        index = part.get("index")
        return Bare(kind, int(index) if isinstance(index, int | float) and index == index else None)
    if len(holding) > 1:
        raise reject("bad_record", f"a part holds its {kind} in `{holding[0]}` and in `{holding[1]}`; which counts?")
    reference = part[holding[0]]
    if isinstance(reference, dict) and "bytes" not in reference:
        draft.sort_unread(reference, (*_READ, *_WHERE), f"content.{holding[0]}.")
    if isinstance(reference, list | tuple):
        reference = Frames(tuple(reference)) if kind == "video" else reference[0] if len(reference) == 1 else reference
    media = draft.media(kind)
    media.append(reference)
    return Image(len(media) - 1) if kind == "image" else Video(len(media) - 1)


def _says(value: Any) -> bool:
    return not names.is_empty(value)
