"""Input and output of generation: requests and answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from megatron_vita.data.sample import MediaFile, Message, Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.sampling_config import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A text that the model continues: no turns, no chat template, no media."""

    text: str = ""
    """A literal `<|im_end|>` in it stays text."""
    ids: tuple[int, ...] | None = None
    """Token ids in place of a text, special tokens included; nothing is put before them."""
    source: str = ""
    """Name of the file it came from."""
    line: int = 0
    """Record number inside its file, from 1."""
    messages: ClassVar[tuple[Message, ...]] = ()
    images: ClassVar[tuple[MediaFile, ...]] = ()
    videos: ClassVar[tuple[MediaFile, ...]] = ()

    @property
    def id(self) -> str:
        """Where it came from, for messages."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to be answered, or a text to be continued."""

    id: str
    """Unique among the requests that an engine works on."""
    sample: Sample | RawPrompt
    """The last turn of a conversation is the user's."""
    sampling: SamplingConfig
    max_new_tokens: int | None = None
    """Maximum tokens of the answer; None: as many as fit."""
    zero_tiles: bool = False
    """Show the model black tiles instead of the pictures'; lengths and ids stay."""
    max_frames: int | None = None
    """Most frames taken from each video; None: as many as the model's preprocessing says."""
    clamp_length: bool = False
    """Lower `max_new_tokens` to what is left of the context, instead of refusing a request that asks for more."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"request {self.id!r}: max_new_tokens={self.max_new_tokens} must be at least 1.")

    def preprocessing(self, spec: PreprocessSpec) -> PreprocessSpec:
        """A model's preprocessing, as this request wants it. Raises ConfigError for fewer than one frame."""
        return spec if self.max_frames is None else replace(spec, max_frames=self.max_frames)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token, and the tokens most likely in its place."""

    id: int
    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the most likely tokens, most likely first."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer."""

    text: str
    """Without special tokens, and without the stop string that ended it; white space is kept."""
    ids: tuple[int, ...]
    """Generated ids. An end token or stop id that ended the answer is not among them; those of a stop string are."""
    finish_reason: FinishReason
    """`stop`: an end token, a stop id or a stop string came; `length`: the answer was cut at its limit."""
    stop_reason: str | int | None = None
    """The stop string or stop id that ended the answer; None: the model's own end token, or the limit."""
    prompt_tokens: int = 0
    """Tokens of the prompt, those of its pictures included."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values an earlier request had left in the cache."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry for each of `ids`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One entry for each prompt token, if asked for; None for the first token, which nothing predicts."""
    prefill_seconds: float = field(default=0.0, compare=False)
    """Wall time from the first step that computed the prompt to the answer's first token; other requests share it."""

    @property
    def finished(self) -> bool:
        """The model ended the answer itself; otherwise it was cut at the limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gave one request."""

    request_id: str
    text: str
    """New text; all pieces together are the answer."""
    outcome: Generation | VitaError | None = None
    """The whole answer, or why there is none; None while it is being written."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the last output, if asked for; all together are the answer's."""
