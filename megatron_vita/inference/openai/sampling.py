"""Fields of a body that say how tokens are chosen, for chat and completions alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_vita.errors import ConfigError
from megatron_vita.inference.grammar import ANY_OBJECT, check_guide
from megatron_vita.inference.openai import fields as read
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.inference.sampling_config import MAX_LOGPROBS, SamplingConfig

MOST = (1 << 63) - 1
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "prompt_logprobs",
)  # fmt: skip
"""Fields that SamplingConfig has under the same name."""
FIELDS = (*_SAME, "stop", "stop_token_ids", "logit_bias", "response_format", "max_tokens", "max_completion_tokens")
"""All fields that are read here."""


def seed_of(id: str) -> int:
    """A seed that depends on nothing but a request's name."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8], "big") & MOST


def wrapped(seed: int) -> int:
    """A seed of 64 bits, signed."""
    return (seed + MOST + 1) % (1 << 64) - MOST - 1


def most_tokens(given: Mapping[str, Any], *, strict: bool) -> int | None:
    """Most tokens of the answer: max_completion_tokens, which OpenAI called max_tokens before. None: not said.

    Raises:
        RequestError: none at all; or, if strict, two numbers.
    """
    limits = {
        name: read.whole(given[name], name, 1, MOST)
        for name in ("max_completion_tokens", "max_tokens")
        if name in given
    }
    if strict and len(set(limits.values())) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens", code="invalid_value"
        )
    return next(iter(limits.values()), None)


def read_sampling(
    given: Mapping[str, Any], id: str, *, logprobs: int | None, vocab_size: int | None, limits: Limits | None
) -> SamplingConfig:
    """How tokens are chosen. The default temperature is OpenAI's and vLLM's, 1; SamplingConfig checks the values.

    Args:
        given: fields of the body that are not null.
        id: of the request, which is the seed where none is given.
        logprobs: see SamplingConfig; chat and completions ask for it differently.
        vocab_size: ids of tokens must be below it; None: not checked.
        limits: of lists and of the schema.

    Raises:
        RequestError: a value that is wrong.
    """
    chosen = {name: given[name] for name in _SAME if name in given}
    if chosen.get("top_k") == -1:  # vLLM's "all"
        chosen["top_k"] = 0
    if "stop" in given:
        strings = (
            [given["stop"]]
            if isinstance(given["stop"], str)
            else read.array(given["stop"], "stop", "a string or an array of strings")
        )
        if limits is not None:
            limits.check("list_entries", len(strings), param="stop")
        chosen["stop"] = tuple(read.text(one, f"stop[{i}]") for i, one in enumerate(strings))
        if limits is not None:
            limits.check("stop_characters", max(map(len, chosen["stop"]), default=0), param="stop")
    if "stop_token_ids" in given:
        chosen["stop_token_ids"] = tuple(read.array(given["stop_token_ids"], "stop_token_ids"))
    if "logit_bias" in given:
        chosen["logit_bias"] = _logit_bias(read.mapping(given["logit_bias"], "logit_bias"))
    if limits is not None:
        for name in ("stop_token_ids", "logit_bias"):
            limits.check("list_entries", len(chosen.get(name, ())), param=name)
    if "response_format" in given:
        chosen["guide"] = _guide(read.mapping(given["response_format"], "response_format"), limits)
    try:
        sampling = SamplingConfig(**{"temperature": 1.0, "seed": seed_of(id), "logprobs": logprobs, **chosen})
    except ConfigError as error:
        name = str(error).partition("=")[0]
        name = "response_format" if name == "guide" else name
        message = f"{name}: {read.shown(str(error))}" if len(str(error)) > 200 else str(error)
        raise RequestError(message, param=name if name in given else None, code="invalid_value") from None
    for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", (i for i, _ in sampling.logit_bias))):
        for one in ids:
            read.whole(one, f"{name}: token id", 0, MOST if vocab_size is None else vocab_size - 1, param=name)
    return sampling


def most_alternatives(value: Any, name: str) -> int:
    """How many alternatives to a token are asked for.

    Raises:
        RequestError: no such number.
    """
    return read.whole(value, name, 0, MAX_LOGPROBS)


def _logit_bias(given: Mapping[str, Any]) -> tuple[tuple[int, Any], ...]:
    """{token id, as JSON's keys are strings: what is added to its logit} -> pairs."""
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise RequestError(
                f"logit_bias: {read.shown(key)!a} is no token id.", param="logit_bias", code="invalid_value"
            )
    return tuple((int(key), bias) for key, bias in given.items())


def _guide(given: Mapping[str, Any], limits: Limits | None) -> str | None:
    """The JSON schema, as JSON, that the answer must match; None: any text."""
    kind = read.text(given.get("type"), "response_format.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type is {read.shown(kind)!a}; there are text, json_object, json_schema.",
            param="response_format.type",
            code="invalid_value",
        )
    place = "response_format.json_schema"
    schema = read.mapping(read.mapping(given.get("json_schema"), place).get("schema"), f"{place}.schema")
    try:
        guide = json.dumps(schema, allow_nan=False, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{place}.schema is no JSON: {error}.", param=place, code="invalid_value") from None
    if limits is not None:
        limits.check("schema_characters", len(guide), param=place)
    try:
        check_guide(guide)
    except ConfigError as error:
        raise RequestError(str(error), param=place, code="invalid_value") from None
    return guide
