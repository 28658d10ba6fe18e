"""Settings of sampling, as OpenAI and vLLM name and bound them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vita.errors import ConfigError

MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities can be asked for, as with OpenAI and vLLM."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return _is_integer(value) and value >= 0  # type: ignore[operator]


def _is_bias(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_token(value[0]) and _is_number(value[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Settings of sampling; ranges as OpenAI and vLLM have them."""

    temperature: float = 0.0
    """Divides the logits; 0: greedy."""
    top_k: int = 0
    """Choose among the k most likely tokens, ties included; 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest most likely tokens whose probabilities sum to at least this; 1: among all."""
    min_p: float = 0.0
    """Choose among tokens at least this times as likely as the most likely one; 0: among all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or the answer and multiplies negative ones; 1: none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that it is in the answer; -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), -100 to 100."""
    seed: int = 1234
    """Seeds every sequence alike, so that an answer does not depend on what is generated beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's end tokens."""
    ignore_eos: bool = False
    """The model's end tokens do not end the answer."""
    min_tokens: int = 0
    """No end token, stop id or stop string ends the answer before it has this many tokens."""
    logprobs: int | None = None
    """Report log-probabilities of the chosen token and of this many most likely ones; None: none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    guide: str | None = None
    """JSON schema, as JSON, that the answer matches unless it is cut (see guide.py); None: any text. It ends where
    nothing can follow, also before `min_tokens`, or where the model ends it, also with `ignore_eos`."""

    def __post_init__(self) -> None:
        self._check("temperature", _is_number, 0, "0 (greedy) or a positive number")
        self._check("top_k", _is_integer, 0, "0 (no limit) or a positive number of tokens")
        self._check("top_p", _is_number, 0, "a number in (0, 1]", 1, positive=True)
        self._check("min_p", _is_number, 0, "a number in [0, 1]", 1)
        self._check("repetition_penalty", _is_number, 0, "a positive number", positive=True)
        self._check("presence_penalty", _is_number, -2, "a number in [-2, 2]", 2)
        self._check("frequency_penalty", _is_number, -2, "a number in [-2, 2]", 2)
        self._check("seed", _is_integer, -(1 << 63), "an integer of 64 bits", (1 << 63) - 1)
        self._check("min_tokens", _is_integer, 0, "0 or a positive number of tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check(name, _is_integer, 0, f"a number of tokens from 0 to {MAX_LOGPROBS}", MAX_LOGPROBS)
        biases = _all_of(self.logit_bias, _is_bias) and all(abs(bias) <= 100 for _, bias in self.logit_bias)
        ids = [one for one, _ in self.logit_bias] if biases else []
        self._require("logit_bias", biases, "pairs of a token id and a bias in [-100, 100]")
        self._require("logit_bias", len(ids) == len(set(ids)), "without a token id that is named twice")
        texts = _all_of(self.stop, lambda one: isinstance(one, str) and one != "")
        self._require("stop", texts, "strings that are not empty")
        self._require("stop_token_ids", _all_of(self.stop_token_ids, _is_token), "token ids, 0 or more")
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        self._require("guide", self.guide is None or isinstance(self.guide, str), "a JSON schema, as JSON")

    def _check(
        self,
        name: str,
        kind: Callable[[object], bool],
        low: float,
        must: str,
        high: float = sys.float_info.max,
        positive: bool = False,
    ) -> None:
        value = getattr(self, name)
        self._require(name, kind(value) and low <= value <= high and not (positive and value == low), must)

    def _require(self, name: str, holds: bool, must: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r} must be {must}.")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens that a model does not have.

        Raises:
            ConfigError: logit_bias or stop_token_ids names one.
        """
        biased = tuple(one for one, _ in self.logit_bias)
        for name, ids in (("logit_bias", biased), ("stop_token_ids", self.stop_token_ids)):
            if max(ids, default=0) >= vocab_size:
                raise ConfigError(f"{name} names token {max(ids)}, but the vocabulary ends at {vocab_size - 1}.")

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def filters(self) -> bool:
        """Whether some tokens are ruled out before the draw."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


def _all_of(values: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(values, tuple) and all(kind(one) for one in values)


GREEDY = SamplingConfig()
"""Greedy decoding."""
