"""How much one request may hold, so that no client takes the memory or the time of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vita.errors import ConfigError
from megatron_vita.inference.openai.errors import RequestError


class LimitError(RequestError):
    """A request that holds more of something than one may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Most of everything that one request may hold. All are checked before a pixel is decoded."""

    body_bytes: int = 1 << 30
    """Bytes of the body. Media in base64 take four bytes of it for three of theirs."""
    json_bytes: int = 32 << 20
    """Bytes of the body without media in base64: parsed, JSON takes up to 25 times its size."""
    text_characters: int = 16 << 20
    """Characters of all texts together."""
    messages: int = 4096
    """Messages of a conversation."""
    parts: int = 64 << 10
    """Parts of all messages together."""
    choices: int = 128
    """Answers: `n` times the number of prompts."""
    list_entries: int = 1024
    """Entries of `stop`, `stop_token_ids` and `logit_bias` each."""
    stop_characters: int = 1024
    """Characters of one stop string: as many of an answer are held back while it streams."""
    schema_characters: int = 64 << 10
    """Characters of the JSON schema in `response_format`."""
    pictures: int = 8192
    """Pictures, and videos, together."""
    picture_bytes: int = 256 << 20
    """Bytes of one picture or video within the body."""
    picture_pixels: int = 89_478_485
    """Pixels of one picture."""
    pixels: int = 16 << 30
    """Pixels of all pictures together."""
    picture_tiles: int = 40
    """Tiles that `max_dynamic_patch` may ask for, the thumbnail not counted."""
    opened: int = 32 << 10
    """Pictures and videos times answers: each answer opens them for itself."""
    videos: int = 64
    """Videos."""
    frames: int = 16384
    """Frames that are looked at, of all videos together."""
    video_seconds: float = 6 * 3600.0
    """Seconds of all videos together."""
    fetches: int = 32
    """Pictures and videos that are downloaded."""
    fetched_bytes: int = 256 << 20
    """Bytes of them together; the last one may be more than is left."""
    prompt_tokens: int | None = None
    """Tokens of the prompt; None: as many as the model and its cache hold."""

    prompt_logprobs: int = 4 << 20
    """Log-probabilities of the prompt's tokens, those of alternatives included."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ConfigError(f"limit {field.name}={value} must be positive.")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Limits:
        """Limits from `NAME=NUMBER` on a command line; the others keep their defaults.

        Raises:
            ConfigError: another form, an unknown name, or a number that cannot be.
        """
        types = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        given: dict[str, float] = {}
        for text in texts:
            name, equals, number = text.partition("=")
            if not equals or name not in types:
                raise ConfigError(f"--limit {text}: give NAME=NUMBER, with one of the names {', '.join(types)}.")
            try:
                given[name] = float(number) if types[name] is float else int(number)
            except ValueError:
                raise ConfigError(f"--limit {text}: {number!r} is no whole number.") from None
        return cls(**given)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, float | None]:
        """Names and values."""
        return dataclasses.asdict(self)

    def check(self, name: str, value: float, *, param: str | None = None, status: int = 400) -> None:
        """Refuse more than a limit allows.

        Args:
            name: of the limit, a field of this class.
            value: what the request has.
            param: field of the body that holds it.
            status: HTTP status of the error.

        Raises:
            LimitError: it has more; the message names limit and value.
        """
        most = getattr(self, name)
        if most is not None and value > most:
            what = name.replace("_", " ")
            has, bound = (f"{number:.15g}" for number in (value, most))
            raise LimitError(
                f"{param or 'the request'}: {has} {what}, but {name}={bound} is the limit. Send less.",
                param=param,
                code=f"{name}_limit",
                status=status,
            )
