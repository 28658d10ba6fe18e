"""One request while it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import Example
from megatron_vita.inference.blocks import BlockTable
from megatron_vita.inference.prefix_cache import Key
from megatron_vita.inference.prompt import Request, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens generated so far; the same on every rank."""

    number: int
    """Counts the engine's requests."""
    request: Request
    example: Example
    """The prompt. Its media carry no bytes."""
    limit: int
    """Tokens that may be generated, at most."""
    table: BlockTable
    keys: tuple[Key, ...] = ()
    """Of the prompt's blocks that may be shared with other requests."""
    generated: list[int] = field(default_factory=list)
    """Generated tokens."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    shared: int = 0
    """Tokens of the prompt that another request had computed."""

    text: str = ""
    """The answer so far, without what a stop string may still cut; empty until the end if nobody reads along."""
    told: int = 0
    """Generated tokens that `text` is made of."""
    first_tokens: npt.NDArray[np.int64] = field(init=False)
    """`[tiles]`: index of each tile's first placeholder token."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Of the prompt's tokens so far, if asked for."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the generated tokens, if asked for."""
    told_logprobs: int = 0
    """Those of `logprobs` that the caller has heard of."""
    started: float | None = None
    """Time of the first step that computed it, by this rank's monotonic clock."""
    prefill_seconds: float = 0.0
    """From `started` to the first generated token."""

    def __post_init__(self) -> None:
        self.first_tokens = np.array([slot.first_token for slot in self.example.tiles], dtype=np.int64)

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        """`[n]` token ids of the prompt."""
        return self.example.tokens

    def __len__(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.example.tokens) + len(self.generated)

    @property
    def decoding(self) -> bool:
        """Only the last generated token is not computed yet."""
        return bool(self.generated) and self.computed == len(self) - 1

    def ids(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Token ids `[stop - start]` of a range of prompt and answer."""
        length = len(self.prompt)
        answer = np.array(self.generated[max(0, start - length) : max(0, stop - length)], dtype=np.int64)
        return np.concatenate([self.prompt[start:stop].astype(np.int64), answer])
