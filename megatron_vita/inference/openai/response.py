"""Answers of the engine -> the body of OpenAI's chat completions response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from megatron_vita.inference.prompt import Generation, TokenLogprob

Spell = Callable[[int], bytes]
"""Bytes that a token adds to a text, such as `VitaTokenizer.token_bytes`."""


def chat_response(choices: Sequence[Generation], *, model: str, spell: Spell) -> dict[str, Any]:
    """The body of a response.

    Args:
        choices: the answers, one for each choice.
        model: the model's name, as the client calls it.
        spell: bytes of a token, for log-probabilities.

    Returns:
        OpenAI's `chat.completion` object, with vLLM's `stop_reason` and, if asked for, `prompt_logprobs`. Tokens of
        the prompt are counted once, those of the answers together; a token that ended an answer is not counted.
    """
    prompt, completion = choices[0].prompt_tokens, sum(len(one.ids) for one in choices)
    body: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(index, one, spell) for index, one in enumerate(choices)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": choices[0].cached_tokens},
        },
    }
    if choices[0].prompt_logprobs is not None:
        body["prompt_logprobs"] = [one and _ranked(one, spell) for one in choices[0].prompt_logprobs]
    return body


def _choice(index: int, answer: Generation, spell: Spell) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        content = [
            {**_token(one.id, one.logprob, spell), "top_logprobs": [_token(*other, spell) for other in one.top]}
            for one in answer.logprobs
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _token(token: int, logprob: float, spell: Spell) -> dict[str, Any]:
    """A token with its log-probability. Its bytes are exact; its text has U+FFFD for a part of a character."""
    spelt = spell(token)
    return {"token": spelt.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelt)}


def _ranked(one: TokenLogprob, spell: Spell) -> dict[str, Any]:
    """vLLM's form of a prompt token: id -> its log-probability, rank (null: not among the likeliest) and text."""
    ranks = {token: rank for rank, (token, _) in enumerate(one.top, 1)}
    return {
        str(token): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token),
            "decoded_token": spell(token).decode(errors="replace"),
        }
        for token, logprob in ((one.id, one.logprob), *(other for other in one.top if other[0] != one.id))
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is OpenAI's number for what is out of the question."""
    return max(logprob, -9999.0)
