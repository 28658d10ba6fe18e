"""Draft: the intermediate form between a record and its Sample; it also classifies fields that no mapper reads."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Part, Role
from megatron_vita.data.sources import fields as names

ROLES: dict[str, Role] = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Role as datasets write it -> role of a Message."""

Kind = Literal["image", "video"]
KINDS: tuple[Kind, Kind] = ("image", "video")


@dataclass(frozen=True, slots=True)
class Bare:
    """A content part without a reference: it stands for the next medium in the record's list."""

    kind: Kind
    index: int | None = None
    """Index in the record's list, if the part has one."""


@dataclass(frozen=True, slots=True)
class Frames:
    """A video stored as a list of pictures."""

    pictures: tuple[Any, ...]


Content = str | list[Part | Bare]
"""Text with `<image>` and `<video>` as placeholders, or a list of explicit parts, in which such tags are text."""


@dataclass(slots=True)
class Turn:
    """One turn of a Draft."""

    role: str
    """As the dataset writes it."""
    content: Content
    learnt: bool = True
    """Of an answer: it carries loss."""
    media: dict[Kind, list[Any]] = field(default_factory=dict)
    """References in fields of the turn other than its content."""
    reasoning: str = ""
    """Of an answer: the reasoning before it."""
    calls: str = ""
    """Of an answer: the functions that it calls, as JSON."""
    is_result: bool = False
    """The turn is the result of a function that an earlier turn called."""

    @property
    def known_role(self) -> Role | None:
        """The role that a Message gets; None if the dataset's role is not known."""
        return "tool" if self.is_result else ROLES.get(self.role)


@dataclass
class Draft:
    """A record whose fields are read, and whose media are not yet placed."""

    turns: list[Turn] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """References as in the record: path, URL, bytes, struct. A mapper adds those of explicit parts only."""
    videos: list[Any] = field(default_factory=list)
    tools: str = ""
    """Functions that may be called, as JSON."""
    text: str | None = None
    """Plain text to learn as it is; then there are no turns."""
    declared: set[str] = field(default_factory=set)
    """Kinds of media whose field the record has; a tag of another kind is plain text."""
    ignore: frozenset[str] = frozenset()
    """Fields that the row or the mix lists under `ignore`."""
    tags: dict[str, tuple[Kind, int]] = field(default_factory=dict)
    """Tags that stand for one medium each -> its kind and number. (`<image>` stands for the next picture.)"""
    spans: list[str] = field(default_factory=list)
    """Fields that select a part of a video."""
    unread: set[str] = field(default_factory=set)
    """Fields with words in them that nothing reads."""

    def media(self, kind: Kind) -> list[Any]:
        """References of a kind."""
        return self.images if kind == "image" else self.videos

    def sort_unread(self, content: Mapping[str, Any], read: Container[str], prefix: str = "") -> None:
        """Sort the fields that were not read into unused and rejected ones.

        A field that would change what is taught rejects the record. Metadata (origin, measurements) are unused; other
        fields with words in them are unused and reported at the end of the run.

        Args:
            content: a record, a turn or a part.
            read: names of fields that were read, as the record writes them.
            prefix: for messages, of the field's name.

        Raises:
            DataError: media_unread, tools_unread, reasoning_unread, field_unread or loss_weight.
        """
        for key, value in content.items():
            if key in read or key in self.ignore or names.is_nothing(value):
                continue
            name, shown = names.plain(str(key)), f"`{prefix}{key}`"
            if name in names.TOOLS:
                raise reject("tools_unread", f"{shown}: nothing teaches calls of functions.{_HINT}")
            if name in names.REASONING:
                raise reject("reasoning_unread", f"{shown}: the chat template has no place for it.{_HINT}")
            if name in names.CONTEXT:
                raise reject("field_unread", f"{shown}: nothing reads it, and a chat template could teach it.{_HINT}")
            if name in names.TRAIN_ON_INPUT:
                raise reject("loss_weight", f"{shown}: loss lies on answers alone.{_HINT}")
            if name in names.SPANS:
                if value != 0:  # from the beginning on
                    self.spans.append(f"{prefix}{key}")
            elif name in names.UNREAD_MEDIA and not isinstance(value, bool | int | float):
                raise reject("media_unread", f"{shown} names media that nothing reads.{_HINT}")
            elif not names.is_metadata(name):
                self._unknown(value, f"{prefix}{key}")

    def _unknown(self, value: Any, name: str) -> None:
        where = names.find_medium(value)
        if where is not None:
            raise reject("media_unread", f"`{name}{where}` looks like a medium, and nothing reads it.{_HINT}")
        if names.has_text(value):
            self.unread.add(name)


_HINT = " To teach the record without it, list the field under `fields: {ignore: [...]}` in the data mix."
