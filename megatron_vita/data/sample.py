"""A Sample: what a dataset says, before any tokenizer or pixel is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_vita.data.rejects import counted, reject

TemplateOptions = tuple[tuple[str, str], ...]
"""(variable of the chat template, its value as JSON), such as ("enable_thinking", "false")."""
Role = Literal["system", "user", "assistant", "tool"]

_LEADING_BREAKS = re.compile(r"\A\s*[\r\n]")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text. A literal `<image>` in it stays text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A reference to `Sample.images[index]`."""

    index: int


@dataclass(frozen=True, slots=True)
class Video:
    """A reference to `Sample.videos[index]`."""

    index: int


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Part, ...]
    learnt: bool = True
    """Of an answer: its tokens carry loss."""
    reasoning: str = ""
    """Of an answer: what is thought before it."""
    calls: str = ""
    """Of an answer: the functions that it calls, as JSON (OpenAI's `tool_calls`)."""


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A picture, video, or folder of frames: a path (already proven to lie under its media root), a region of such a
    file (a member of an archive, an item of a shard), or bytes."""

    path: str | None = None
    data: bytes | None = None
    offset: int = 0
    """Where the region begins in `path`."""
    size: int | None = None
    """Bytes of the region; None: the whole file, or folder."""
    label: str | None = None
    """What to call it in messages, where `path` alone says too little (archive and member)."""
    frames: tuple[MediaFile, ...] = ()
    """The pictures, in order, of a folder of frames in an archive; then there is neither path nor data."""
    frame_rate: float = 1.0
    """Pictures of a folder of frames that make a second."""
    max_tiles: int | None = None
    """Most tiles of a picture (thumbnail not counted); None: as many as the preprocessing says."""
    start: float = 0.0
    """Of a video: where the part that is asked for begins, in seconds."""
    end: float | None = None
    """Of a video: where that part ends, in seconds; None: with the video. What is shown at either end is part of it."""

    @property
    def name(self) -> str:
        """For messages."""
        return self.label or self.path or "embedded medium"


def check_text(text: str) -> None:
    """Prove that a text is characters alone: JSON can write half of a surrogate pair, which no tokenizer takes.

    Raises:
        DataError: bad_record.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise reject(
            "bad_record", f"the text holds half a character at {error.start} (a lone surrogate, \\ud800 to \\udfff)."
        ) from None


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or chat example in the canonical form every dataset is mapped to."""

    messages: tuple[Message, ...]
    images: tuple[MediaFile, ...] = ()
    videos: tuple[MediaFile, ...] = ()
    source: str = ""
    """Name of the dataset it came from."""
    line: int = 0
    """Record number inside its file, from 1."""
    tools: str = ""
    """Functions that may be called, as JSON (OpenAI's `tools`)."""
    template_options: TemplateOptions = ()
    """What the chat template is asked for beside its defaults."""

    @property
    def id(self) -> str:
        """Where the sample came from, for messages and ledgers."""
        return f"{self.source}:{self.line}"

    @property
    def is_plain(self) -> bool:
        """Is it turns of text and media alone? Else `data/text/spell_out.py` makes it so, or nobody can."""
        return not (self.tools or any(m.reasoning or m.calls or m.role == "tool" for m in self.messages))

    def check_texts(self) -> None:
        """Prove that every text is characters alone.

        Raises:
            DataError: bad_record.
        """
        for message in self.messages:
            check_text(message.reasoning)
            for part in message.parts:
                if isinstance(part, Text):
                    check_text(part.text)

    def check(self) -> None:
        """Turns must be [system] (user assistant)* [user]; every picture and video must be referred to exactly once.

        Raises:
            DataError: whose message starts with the error code (`bad_order`, `bad_record`, `empty_turn`,
                `media_count`; `tools_unread` or `reasoning_unread`, if it is not plain).
        """
        if self.tools or any(message.calls or message.role == "tool" for message in self.messages):
            raise reject("tools_unread", f"{self.id}: it defines or calls functions")
        if not self.is_plain:
            raise reject("reasoning_unread", f"{self.id}: it holds reasoning beside an answer")
        self.check_texts()
        turns = [m for m in self.messages if m.role != "system"]
        if any(m.role == "system" for m in self.messages[1:]) or not turns:
            raise reject("bad_order", f"{self.id}: a system turn may only come first, and some turn must follow")
        for number, message in enumerate(turns):
            if message.role != ("user", "assistant")[number % 2]:
                raise reject(
                    "bad_order", f"{self.id}: turn {number + 1} is {message.role}; turns must alternate from user"
                )
            if not any(not isinstance(p, Text) or p.text.strip() for p in message.parts):
                raise reject("empty_turn", f"{self.id}: turn {number + 1} says nothing")
        for kind, media in ((Image, self.images), (Video, self.videos)):
            used = sorted(p.index for m in self.messages for p in m.parts if isinstance(p, kind))
            if used != list(range(len(media))):
                raise reject(
                    "media_count",
                    f"{self.id}: {counted(len(media), kind.__name__.lower())}, but the turns refer to {used}",
                )
        if any(not isinstance(p, Text) for m in self.messages if m.role == "assistant" for p in m.parts):
            raise reject("media_count", f"{self.id}: a picture stands in an assistant turn")


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for language modelling: no turns, no media, labels on all tokens."""

    text: str
    source: str = ""
    """Name of the dataset it came from."""
    line: int = 0
    """Record number inside its file, from 1."""

    @property
    def id(self) -> str:
        """Where the text came from, for messages and ledgers."""
        return f"{self.source}:{self.line}"


def clean_answer(text: str, *, blanks: bool = False) -> str:
    """An answer without leading line breaks (and the blanks before them).

    The tokenizer would join them with the newline of the turn's header, and the ids would no longer be those of the
    header and the answer one after the other.

    Args:
        text: the answer.
        blanks: remove all leading blanks: there are tokenizers that join these too (GPT-2's).
    """
    return text.lstrip() if blanks else _LEADING_BREAKS.sub("", text, count=1)
