"""An engine that answers without a model: it echoes the question's words as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from megatron_vita.data.media.open import read_items
from megatron_vita.data.sample import Text
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import VitaError
from megatron_vita.inference.prompt import Generation, Request, TokenLogprob


class FakeEngine:
    """`Engine.run` to the letter: pulls requests lazily, at most `most` at once, and finishes the latest first."""

    leader = True

    def __init__(self, *, most: int = 2, answer: Callable[[Request], str] | None = None) -> None:
        self.most = most
        self.asked: list[Request] = []
        self._answer = answer or (lambda request: f"{text_of(request)} #{request.sampling.seed}")

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Generation | VitaError]]:
        """Outcomes, as they are finished."""
        waiting = iter(requests)
        held: list[Request] = []
        while True:
            while len(held) < self.most and (one := next(waiting, None)) is not None:
                held.append(one)
            if not held:
                return
            request = held.pop()
            self.asked.append(request)
            yield request, self._outcome(request)

    def _outcome(self, request: Request) -> Generation | VitaError:
        try:
            read_items(request.sample, PreprocessSpec())
            text = self._answer(request)
        except VitaError as error:
            return error
        ids = tuple(range(len(text)))[: request.max_new_tokens]
        wanted = request.sampling.logprobs
        logprobs = None
        if wanted is not None:
            logprobs = tuple(TokenLogprob(one, -0.5, tuple((j, -0.5 - j) for j in range(wanted))) for one in ids)
        return Generation(text, ids, "stop" if len(ids) == len(text) else "length", None, 10, 4, logprobs, None)


def text_of(request: Request) -> str:
    """Text of a request's last turn."""
    return "".join(part.text for part in request.sample.messages[-1].parts if isinstance(part, Text))
