"""Batches of requests in the file format of OpenAI's batch API, answered without a server.

A line of the input is {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}; each gets one line of the
output (see `AnswerFile`), in the order in which they are finished. A line that fails has status code 400 and, as its
body, OpenAI's {"error": {"message", "type", "param", "code"}} (as in the error file of OpenAI's API); `error` holds the
same object (as `vllm run-batch` writes it), and is null otherwise. What has no custom_id of its own (no JSON, none
given, one given twice) gets its line under null.

The digest in a line's `id` covers all that decides the answer: model, settings, body and the bytes of its media. So a
run that goes on knows which answers still hold: these are kept, others are asked again, and so is what failed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.answer_file import AnswerFile
from megatron_vita.inference.answer_key import MediaKeys, run_key
from megatron_vita.inference.openai import (
    ApiRequest,
    ReadOptions,
    RequestError,
    chat_request,
    chat_response,
    error_object,
)
from megatron_vita.inference.openai.fields import text
from megatron_vita.inference.openai.response import Spell
from megatron_vita.inference.prompt import Generation, Request

log = logging.getLogger(__name__)

URL = "/v1/chat/completions"
"""The one endpoint that is answered."""
_MEMBERS = ("custom_id", "method", "url", "body")


class RunsRequests(Protocol):
    """What is needed of an engine."""

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Generation | VitaError]]:
        """Pull requests as there is room for them, and give each with its outcome as it is finished."""


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a run did."""

    kept: int
    """Requests that had their answer already."""
    answered: int
    failed: int


@dataclass(slots=True)
class _Asked:
    """A request whose choices are not all there."""

    key: str
    chat: ApiRequest
    answers: dict[str, Generation] = field(default_factory=dict)


class BatchRun:
    """One batch, from its input to its output; a context manager that holds the output for this process alone.

    The input is read line by line, twice: first to count its requests and to see which answers still hold.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        model: str,
        identity: Callable[[], str],
        media_root: Path | None,
        vocab_size: int,
    ) -> None:
        """Prepare a run; nothing is opened yet.

        Args:
            source: requests, a JSON object a line.
            output: answers; created, or gone on with.
            model: name of the model where a request gives none.
            identity: gives what changes with all that decides an answer but the request; called once the output is
                held, for it may read the whole model.
            media_root: folder of the media; by default that of the input.
            vocab_size: ids of tokens in a request must be below it.

        Raises:
            ConfigError: no input, no folder of media, or input and output are one file.
        """
        self._source, self._model, self._vocab_size = source, model, vocab_size
        self._make_identity, self._identity = identity, ""
        self._media_root = source.parent if media_root is None else media_root
        if not source.is_file():
            raise ConfigError(f"{source}: no such file. Check --input.")
        if output.exists() and output.samefile(source):
            raise ConfigError(f"{output}: these are the requests. Give another file with --output.")
        if not self._media_root.is_dir():
            raise ConfigError(f"{self._media_root}: no such folder. Check --media-root.")
        self._output = AnswerFile(output)
        self._keys = MediaKeys()
        self._held = ExitStack()
        self._answered = self._failed = 0
        self.total = 0
        """Lines of the input."""
        self.kept = 0
        """Requests whose answer still holds."""

    def __enter__(self) -> BatchRun:
        """Open the output, count the requests, and drop answers that no longer hold. Raises as AnswerFile does."""
        with ExitStack() as stack:
            answers = stack.enter_context(self._output)
            self._identity = self._make_identity()
            known, holds = dict(answers.answers), set(answers.answers)
            for number, custom_id, body in self._lines():
                self.total += 1
                if custom_id in known:
                    if self._digest(custom_id, body, number) == known[custom_id]:
                        self.kept += 1
                    else:
                        holds.remove(custom_id)
            if dropped := answers.keep(holds):
                log.info("%s: %d answers to other requests or by another model are asked anew", answers.path, dropped)
            if foreign := len(holds) - self.kept:
                log.warning("%s: holds %d answers to requests that are not in the input", answers.path, foreign)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def left(self) -> int:
        """Lines that are to be answered."""
        return self.total - self.kept

    def answer(self, engine: RunsRequests, spell: Spell, *, progress: bool = True) -> BatchSummary:
        """Ask what has no answer, and append each answer as it comes.

        Args:
            engine: pulls requests as it has room for them.
            spell: bytes of a token.
            progress: show a bar on standard error, with tokens a second.

        Raises:
            DataError: the output cannot be written.
        """
        asked: dict[str, _Asked] = {}
        with _Progress(self.total, self.kept, progress) as bar:
            for request, outcome in engine.run(self._requests(asked, bar)):
                custom_id = request.id.rpartition("-")[0]
                if custom_id not in asked:  # another choice of it failed
                    continue
                one = asked[custom_id]
                if isinstance(outcome, VitaError):
                    del asked[custom_id]
                    self._fail(custom_id, one.key, outcome, bar)
                    continue
                bar.tokens(outcome)
                one.answers[request.id] = outcome
                if len(one.answers) == len(one.chat.requests):
                    del asked[custom_id]
                    choices = [one.answers[choice.id] for choice in one.chat.requests]
                    body = chat_response(choices, model=one.chat.model or self._model, spell=spell)
                    self._output.add(custom_id, one.key, body, None)
                    self._answered += 1
                    bar.update()
        return BatchSummary(self.kept, self._answered, self._failed)

    def _fail(self, custom_id: str | None, key: str | None, error: VitaError, bar: _Progress) -> None:
        why = error_object(error)
        self._output.add(custom_id, key, {"error": why}, why)
        self._failed += 1
        bar.update()

    def _requests(self, asked: dict[str, _Asked], bar: _Progress) -> Iterator[Request]:
        """Requests that are to be asked, as the engine pulls them; what cannot be asked gets its line at once."""
        for number, custom_id, body in self._lines():
            if custom_id in self._output.answers:
                continue
            try:
                if isinstance(body, RequestError):
                    raise body
                assert custom_id is not None, "only a line that is in error has no name"
                chat, key = self._read(custom_id, body, number)
            except VitaError as error:
                self._fail(custom_id, None, error, bar)
                continue
            asked[custom_id] = _Asked(key, chat)
            yield from chat.requests

    def _lines(self) -> Iterator[tuple[int, str | None, Any]]:
        """(number of the line, its custom_id if it has one of its own, its body or the RequestError of the line)."""
        seen: dict[str, int] = {}
        with self._source.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    custom_id, body = _parsed(raw, number, seen)
                    if custom_id is not None:
                        seen[custom_id] = number
                    yield number, custom_id, body

    def _read(self, custom_id: str, body: Any, number: int) -> tuple[ApiRequest, str]:
        """A request, and the digest of all that decides its answer."""
        options = ReadOptions(
            strict=True,
            media_root=self._media_root,
            vocab_size=self._vocab_size,
            source=self._source.name,
            line=number,
        )
        chat = chat_request(body, id=custom_id, options=options)
        if chat.stream:
            raise RequestError("stream: a batch is not streamed. Remove it.", param="stream", code="invalid_value")
        sample = chat.requests[0].sample
        media = [self._keys.key(file) for file in (*sample.images, *sample.videos) if file.path is not None]
        return chat, run_key(self._identity, {"custom_id": custom_id, "body": body}, json.dumps(media))

    def _digest(self, custom_id: str | None, body: Any, number: int) -> str | None:
        """The digest of a request; None if it cannot be asked."""
        try:
            return (
                None if custom_id is None or isinstance(body, RequestError) else self._read(custom_id, body, number)[1]
            )
        except VitaError:
            return None  # it is asked again, and its line says then what is wrong


class _Progress:
    """A bar of requests, with the tokens a second of those that are finished."""

    def __init__(self, total: int, initial: int, show: bool) -> None:
        self._bar = tqdm(total=total, initial=initial, unit="req", smoothing=0.1, mininterval=0.5, disable=not show)
        self._start = time.monotonic()
        self._prompt = self._generated = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tokens(self, answer: Generation) -> None:
        """Count those of an answer."""
        self._prompt += answer.prompt_tokens
        self._generated += len(answer.ids)

    def update(self) -> None:
        """A request has its line."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"{self._generated / seconds:.1f} tok/s generated, {self._prompt / seconds:.0f} tok/s prompt"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update()


def _parsed(raw: bytes, number: int, seen: Mapping[str, int]) -> tuple[str | None, Any]:
    """(custom_id or None, body or what is wrong) of a line of the input."""

    def wrong(message: str, param: str | None = None) -> RequestError:
        return RequestError(f"line {number}: {message}", param=param, code="invalid_line")

    try:
        record = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return None, wrong(f"not JSON: {error}.")
    if not isinstance(record, dict):
        return None, wrong("not a JSON object.")
    try:
        custom_id = text(record.get("custom_id"), "custom_id")
    except RequestError as error:
        return None, wrong(str(error), "custom_id")
    if not custom_id:
        return None, wrong("custom_id is empty.", "custom_id")
    if custom_id in seen:
        return None, wrong(f"custom_id {custom_id!a} stands on line {seen[custom_id]} already.", "custom_id")
    if record.get("method") != "POST":
        return custom_id, wrong("method must be POST.", "method")
    if record.get("url") != URL:
        return custom_id, wrong(f"url must be {URL}.", "url")
    if unknown := [name for name in record if name not in _MEMBERS]:
        return custom_id, wrong(f"{unknown[0]!a} is not known; there are {', '.join(_MEMBERS)}.", unknown[0])
    return custom_id, record.get("body")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
