"""Media within a body: data URLs (RFC 2397) in base64.

Base64 is decoded in pieces, out of the body itself where it is there: the media are in memory once beside it, and other
threads get their turn between two pieces.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vita.data.sample import MediaFile
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import shown

_PIECE = 1 << 18
"""Characters of base64 that are decoded at once; a multiple of 4."""
_FRAMES = "video/jpeg"
"""Media type of frames of one second each, separated by commas, as vLLM has it."""


@dataclass(frozen=True, slots=True)
class DataUrl:
    """A data URL whose content still lies in the body."""

    head: str
    """What stands between `data:` and the comma."""
    content: memoryview
    """What stands behind the comma, as ASCII."""

    @classmethod
    def parse(cls, url: str) -> DataUrl:
        """Take one apart. `url`: begins with `data:`; one without a comma has no content."""
        head, _, content = url[len("data:") :].partition(",")
        return cls(head, memoryview(content.encode("ascii", "replace")))

    def __str__(self) -> str:
        return f"data:{self.head},{bytes(self.content).decode('latin-1')}"

    def frames(self) -> int:
        """Frames that it holds; 0 if it is no list of frames."""
        return sum(1 for _ in _split(self.content)) if self._media_type == _FRAMES else 0

    def medium(self, place: str, kind: str, most_bytes: int) -> MediaFile:
        """Decode it.

        Args:
            place: field of the body, for messages and as the medium's name.
            kind: `image` or `video`.
            most_bytes: of the medium.

        Raises:
            RequestError: another kind, no base64, or too many bytes.
        """
        options = self.head.split(";")[1:]
        if "base64" not in options or not len(self.content):
            raise RequestError(f"{place}: the data URI is not in base64, or empty.", param=place, code="media_broken")
        if not self._media_type.startswith(f"{kind}/"):
            raise RequestError(
                f"{place}: the data URI is of type {shown(self._media_type)!a}, not {kind}/...",
                param=place,
                code="media_broken",
            )
        if len(self.content) // 4 * 3 > most_bytes:
            raise RequestError(
                f"{place}: the data URI holds {len(self.content) // 4 * 3} bytes, but picture_bytes={most_bytes} is "
                "the limit. Put the file below the media root.",
                param=place,
                code="media_bomb",
            )
        try:
            if self._media_type == _FRAMES:
                return MediaFile(
                    frames=tuple(MediaFile(data=decoded(part), label=place) for part in _split(self.content)),
                    label=place,
                )
            return MediaFile(data=decoded(self.content), label=place)
        except ValueError as error:
            raise RequestError(
                f"{place}: the data URI is no base64: {error}.", param=place, code="media_broken"
            ) from None

    @property
    def _media_type(self) -> str:
        return self.head.partition(";")[0].lower()


def decoded(content: memoryview) -> bytes:
    """The bytes that base64 stands for.

    Raises:
        ValueError: other characters, or padding that is missing or not at the end.
    """
    if len(content) <= _PIECE:
        return base64.b64decode(content, validate=True)
    out = io.BytesIO()
    for start in range(0, len(content), _PIECE):
        piece = base64.b64decode(content[start : start + _PIECE], validate=True)
        if start + _PIECE < len(content) and len(piece) != _PIECE // 4 * 3:
            raise ValueError("padding before the end")
        out.write(piece)
    return out.getvalue()  # the buffer itself, not a copy


def _split(content: memoryview) -> Iterator[memoryview]:
    """What stands between commas."""
    start = 0
    for match in re.finditer(rb",", content):
        yield content[start : match.start()]
        start = match.end()
    yield content[start:]
