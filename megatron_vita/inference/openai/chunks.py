"""An answer while it is written -> the objects of OpenAI's stream of server-sent events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megatron_vita.inference.openai import response as whole
from megatron_vita.inference.openai.response import CompletionLogprobs, Kind, Spell
from megatron_vita.inference.prompt import Generation, Output, TokenLogprob

_OBJECTS: dict[Kind, str] = {"chat": "chat.completion.chunk", "completion": "text_completion"}


class Chunks:
    """Makes the chunks of one response, whose choices may come interleaved.

    Of each choice: `open` first, `piece` for every output (the last one too), then `close`; after all choices, `usage`.
    The pieces of a choice, one after the other, are its text and its log-probabilities in `response`.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        id: str,
        model: str,
        spell: Spell,
        include_usage: bool = False,
        prompts: int = 1,
        echo: Sequence[str] = (),
    ) -> None:
        """
        Args:
            kind: which endpoint was asked.
            id: the response's own name, in every chunk.
            model: the model's name, as the client calls it.
            spell: bytes of a token, for log-probabilities.
            include_usage: OpenAI's `stream_options.include_usage`: a chunk of its own has the usage, which is null in
                the others.
            prompts: prompts of the request; see `response`.
            echo: what the text of each choice of a completion begins with.
        """
        self._kind, self._spell, self._prompts = kind, spell, prompts
        self._head = {"id": id, "object": _OBJECTS[kind], "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        self._echo = echo
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def open(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice: the role of a chat's; a completion's prompt, or None if none is echoed."""
        if self._kind == "chat":
            return self._chunk(index, "", role="assistant")
        return self._chunk(index, self._echo[index]) if self._echo else None

    def piece(self, index: int, output: Output) -> dict[str, Any] | None:
        """The chunk of what a step gave a choice; None if that is nothing to be seen."""
        return self._chunk(index, output.text, output.logprobs) if output.text or output.logprobs else None

    def close(self, index: int, answer: Generation) -> dict[str, Any]:
        """The chunk that ends a choice and says why."""
        return self._chunk(index, "", answer=answer)

    def usage(self, answers: Sequence[Generation]) -> dict[str, Any] | None:
        """The last chunk, if the client asked for it: the usage of all choices, in their order."""
        if not self._include_usage:
            return None
        return {**self._head, "choices": [], "usage": whole.usage(answers, self._prompts)}

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        *,
        role: str | None = None,
        answer: Generation | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self._kind == "chat":
            delta = {"role": role, "content": text, "refusal": None} if role else {"content": text} if text else {}
            choice |= {"delta": delta, "logprobs": whole.chat_logprobs(logprobs, self._spell) if logprobs else None}
        else:
            write = self._logprobs.setdefault(index, CompletionLogprobs(self._spell))
            choice |= {"text": text, "logprobs": write(logprobs) if logprobs else None}
        choice["finish_reason"] = answer and answer.finish_reason
        if answer is not None:
            choice["stop_reason"] = answer.stop_reason
        return {**self._head, "choices": [choice], **({"usage": None} if self._include_usage else {})}
