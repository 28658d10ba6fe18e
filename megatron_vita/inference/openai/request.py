"""The body of OpenAI's chat completions request -> requests of the engine.

Names, defaults and ranges are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`,
`min_tokens` and `prompt_logprobs` are vLLM's additions. A field that is not read is refused by name, unless it changes
no answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vita.errors import ConfigError
from megatron_vita.inference.openai import fields as read
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.messages import conversation
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling_config import MAX_LOGPROBS, SamplingConfig

MAX_CHOICES = 128
"""Most choices of a request, as OpenAI has it."""
_MOST = (1 << 63) - 1

_HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "session_id", "priority", "cache_salt", "parallel_tool_calls", "return_token_ids",
)  # fmt: skip
"""Fields that change no answer: who asks, where it is kept, in which order it is computed."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "use_beam_search": (False,),
    "length_penalty": (1, 1.0), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "echo": (False,), "add_special_tokens": (False,), "bad_words": ([],),
}  # fmt: skip
"""Fields that ask for what there is not, with the values under which they ask for nothing."""
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "prompt_logprobs",
)  # fmt: skip
"""Fields that SamplingConfig has, too."""
_READ = (
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "logit_bias", "logprobs",
    "top_logprobs", "n", "stream", *_SAMPLING,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request of a client."""

    requests: tuple[Request, ...]
    """One for each choice, alike but for ids and seeds; their ids are `ID-0`, `ID-1`, ..."""
    model: str | None
    """Name of the model as the client calls it."""
    stream: bool
    """Send the answer as it comes."""


def chat_request(
    body: Any,
    *,
    id: str,
    media_root: Path | None = None,
    vocab_size: int | None = None,
    source: str = "request",
    line: int = 1,
) -> ChatRequest:
    """Read the body of a request to /v1/chat/completions; no medium is opened.

    Args:
        body: parsed JSON.
        id: names the request; where the body has no `seed`, the seed is derived from it, so that a batch repeats.
        media_root: see `conversation`.
        vocab_size: ids of tokens must be below it; None: not checked.
        source: file that the request came from, for messages.
        line: its line.

    Raises:
        RequestError: a field that is missing, wrong or not supported; its `param` names it.
    """
    given = {name: value for name, value in read.mapping(body, "body").items() if value is not None}
    for name, allowed in _ONLY.items():
        if name in given and given[name] not in allowed:
            raise RequestError(f"{name} is not supported. Remove it.", param=name, code="unsupported_parameter")
    read.known_keys(given, (*_READ, *_HARMLESS, *_ONLY), "")
    model = read.text(given["model"], "model") if "model" in given else None
    stream = read.boolean(given.get("stream", False), "stream")
    sample = conversation(given.get("messages"), media_root=media_root, source=source, line=line)
    limit = _limit(given)
    sampling = _sampling(given, id, vocab_size)
    if limit is not None and sampling.min_tokens > limit:
        raise RequestError(
            f"min_tokens={sampling.min_tokens} is more than max_tokens={limit}.",
            param="min_tokens",
            code="invalid_value",
        )
    choices = read.whole(given.get("n", 1), "n", 1, MAX_CHOICES)
    return ChatRequest(
        tuple(
            Request(f"{id}-{choice}", sample, replace(sampling, seed=_wrapped(sampling.seed + choice)), limit)
            for choice in range(choices)
        ),
        model,
        stream,
    )


def seed_of(id: str) -> int:
    """A seed that depends on nothing but a request's name."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8], "big") & _MOST


def _wrapped(seed: int) -> int:
    """A seed of 64 bits, signed."""
    return (seed + _MOST + 1) % (1 << 64) - _MOST - 1


def _limit(given: Mapping[str, Any]) -> int | None:
    """Most tokens of the answer: max_completion_tokens, which OpenAI called max_tokens before."""
    limits = {
        name: read.whole(given[name], name, 1, _MOST)
        for name in ("max_completion_tokens", "max_tokens")
        if name in given
    }
    if len(set(limits.values())) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens", code="invalid_value"
        )
    return next(iter(limits.values()), None)


def _sampling(given: Mapping[str, Any], id: str, vocab_size: int | None) -> SamplingConfig:
    """How tokens are chosen. The default temperature is OpenAI's and vLLM's, 1; SamplingConfig checks the values."""
    chosen = {name: given[name] for name in _SAMPLING if name in given}
    if chosen.get("top_k") == -1:  # vLLM's "all"
        chosen["top_k"] = 0
    if "stop" in given:
        strings = [given["stop"]] if isinstance(given["stop"], str) else read.array(given["stop"], "stop")
        chosen["stop"] = tuple(read.text(one, f"stop[{i}]") for i, one in enumerate(strings))
    if "stop_token_ids" in given:
        chosen["stop_token_ids"] = tuple(read.array(given["stop_token_ids"], "stop_token_ids"))
    if "logit_bias" in given:
        chosen["logit_bias"] = _logit_bias(read.mapping(given["logit_bias"], "logit_bias"))
    top = read.whole(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS)
    if read.boolean(given.get("logprobs", False), "logprobs"):
        chosen["logprobs"] = top
    elif top:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
    try:
        sampling = SamplingConfig(**{"temperature": 1.0, "seed": seed_of(id), **chosen})
    except ConfigError as error:
        name = str(error).partition("=")[0]
        raise RequestError(str(error), param=name if name in given else None, code="invalid_value") from None
    for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", (i for i, _ in sampling.logit_bias))):
        for one in ids:
            read.whole(one, f"{name}: token id", 0, _MOST if vocab_size is None else vocab_size - 1, param=name)
    return sampling


def _logit_bias(given: Mapping[str, Any]) -> tuple[tuple[int, Any], ...]:
    """{token id, as JSON's keys are strings: what is added to its logit} -> pairs."""
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise RequestError(f"logit_bias: {key!a} is no token id.", param="logit_bias", code="invalid_value")
    return tuple((int(key), bias) for key, bias in given.items())
