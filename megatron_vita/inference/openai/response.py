"""Answers of the engine -> the body of OpenAI's response to a chat completions or completions request."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from megatron_vita.inference.prompt import Generation, TokenLogprob

Spell = Callable[[int], bytes]
"""Bytes that a token adds to a text, such as `VitaTokenizer.token_bytes`."""
Kind = Literal["chat", "completion"]
"""Which endpoint was asked: /v1/chat/completions or /v1/completions."""

OBJECTS: dict[Kind, str] = {"chat": "chat.completion", "completion": "text_completion"}
"""OpenAI's name of the object that an endpoint answers with."""


def chat_response(choices: Sequence[Generation], *, model: str, spell: Spell) -> dict[str, Any]:
    """The body of a response to a chat completions request under a name of its own; see `response`."""
    return response("chat", choices, id=f"chatcmpl-{uuid.uuid4().hex}", model=model, spell=spell)


def response(
    kind: Kind,
    answers: Sequence[Generation],
    *,
    id: str,
    model: str,
    spell: Spell,
    prompts: int = 1,
    echo: Sequence[str] = (),
) -> dict[str, Any]:
    """The body of a response.

    Args:
        kind: which endpoint was asked.
        answers: one for each choice: all those of the first prompt, then those of the second, and so on.
        id: the response's own name.
        model: the model's name, as the client calls it.
        spell: bytes of a token, for log-probabilities.
        prompts: prompts of the request (/v1/completions takes several), each with equally many answers.
        echo: what the text of each choice of a completion begins with.

    Returns:
        OpenAI's `chat.completion` or `text_completion` object, with vLLM's `stop_reason` and, if asked for,
        `prompt_logprobs` (beside the choices of a chat, within each choice of a completion).
    """
    if echo:
        answers = [replace(one, text=text + one.text) for text, one in zip(echo, answers, strict=True)]
    body: dict[str, Any] = {
        "id": id,
        "object": OBJECTS[kind],
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(kind, index, one, spell) for index, one in enumerate(answers)],
        "usage": usage(answers, prompts),
    }
    if kind == "chat" and answers[0].prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(answers[0].prompt_logprobs, spell)
    return body


def usage(answers: Sequence[Generation], prompts: int = 1) -> dict[str, Any]:
    """OpenAI's `usage` object. Tokens of a prompt are counted once, those of all answers together; a token that ended
    an answer is not counted.

    Args:
        answers: as in `response`.
        prompts: as in `response`.
    """
    each = [answers[place] for place in range(0, len(answers), len(answers) // prompts)]
    prompt, completion = sum(one.prompt_tokens for one in each), sum(len(one.ids) for one in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in each)},
    }


def chat_logprobs(tokens: Sequence[TokenLogprob], spell: Spell) -> dict[str, Any]:
    """OpenAI's `logprobs` object of a chat's choice."""
    content = [
        {**_token(one.id, one.logprob, spell), "top_logprobs": [_token(*other, spell) for other in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Writes the `logprobs` object of one choice of a completion, in one piece or in several."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._characters = 0

    def __call__(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object of the next tokens.

        A token that is no whole text is written as OpenAI does it there, `bytes:\\xc3`. `text_offset` is the character
        in which the token begins, among those that the answer's tokens spell. The chosen token is always among
        `top_logprobs`, so there may be one more than was asked for.
        """
        spelt = [self._spell(one.id) for one in tokens]
        return {
            "tokens": [_text(one) for one in spelt],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [
                {_text(self._spell(token)): _finite(value) for token, value in ((one.id, one.logprob), *one.top)}
                for one in tokens
            ],
            "text_offset": [self._offset(one) for one in spelt],
        }

    def _offset(self, spelt: bytes) -> int:
        begins = [byte & 0xC0 != 0x80 for byte in spelt]  # UTF-8: all bytes of a character but the first are 10xxxxxx
        within = bool(begins) and not begins[0] and self._characters > 0
        offset = self._characters - within
        self._characters += sum(begins)
        return offset


def prompt_logprobs(tokens: Sequence[TokenLogprob | None], spell: Spell) -> list[dict[str, Any] | None]:
    """vLLM's form of a prompt: of each token id -> its log-probability, rank (null: not among the likeliest), text."""
    return [None if one is None else _ranked(one, spell) for one in tokens]


def _choice(kind: Kind, index: int, answer: Generation, spell: Spell) -> dict[str, Any]:
    ending = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    if kind == "chat":
        logprobs = None if answer.logprobs is None else chat_logprobs(answer.logprobs, spell)
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, **ending}
    logprobs = None if answer.logprobs is None else CompletionLogprobs(spell)(answer.logprobs)
    choice: dict[str, Any] = {"index": index, "text": answer.text, "logprobs": logprobs, **ending}
    if answer.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs, spell)
    return choice


def _token(token: int, logprob: float, spell: Spell) -> dict[str, Any]:
    """A token with its log-probability. Its bytes are exact; its text has U+FFFD for a part of a character."""
    spelt = spell(token)
    return {"token": spelt.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelt)}


def _text(spelt: bytes) -> str:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def _ranked(one: TokenLogprob, spell: Spell) -> dict[str, Any]:
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
