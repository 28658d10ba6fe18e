"""Requests of clients while they are read, prepared and answered. All of it runs in the event loop's thread.

A job belongs to nobody: clients listen to it. One that sends the same request again while it runs, as clients do that
lost patience, listens to the same job. A job that nobody listens to any more is given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from megatron_vita.errors import VitaError
from megatron_vita.inference.openai import ApiRequest
from megatron_vita.inference.prompt import Generation, Output

if TYPE_CHECKING:
    from megatron_vita.inference.prepare import Prepared
    from megatron_vita.serving.engine_loop import EngineLoop

Read = Callable[[], Awaitable["tuple[ApiRequest, list[Prepared]]"]]
"""Reads a body and prepares its requests; raises a VitaError that says what is wrong with it."""


class GivenUpError(VitaError):
    """All clients of a request have gone."""


@dataclass(frozen=True, slots=True)
class Piece:
    """An output of one of a job's choices."""

    index: int
    output: Output


class Job:
    """One request, from its body to its last token."""

    def __init__(self, id: str, loop: EngineLoop, size: int) -> None:
        """`start` sets it going.

        Args:
            id: part of the ids that its requests have in the engine.
            loop: where they are answered.
            size: bytes of its body.
        """
        self.id, self.size = id, size
        self.begun = time.monotonic()
        self.first: float | None = None
        """Time of the first output."""
        self.request: ApiRequest | None = None
        self.answers: list[Generation | None] = []
        self.failure: Exception | None = None
        self.listeners = 0
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._pieces: list[Piece] = []
        self._wake: set[asyncio.Event] = set()
        self._running: set[str] = set()  # ids in the engine

    @property
    def done(self) -> bool:
        """Every choice has its answer, or there will be none."""
        return self.failure is not None or (bool(self.answers) and all(one is not None for one in self.answers))

    def start(self, read: Read, ended: Callable[[Job], None]) -> None:
        """Read, prepare, and hand over to the engine."""
        self._ended = ended
        self._task = asyncio.create_task(self._begin(read))

    async def ready(self) -> ApiRequest:
        """The request as it was read, once it waits for the engine.

        Raises:
            Exception: why it cannot be answered.
        """
        async for _ in self._changes():
            if self.failure is not None:
                raise self.failure
            if self.answers:
                break
        assert self.request is not None
        return self.request

    async def pieces(self, *, ping: float | None = None) -> AsyncIterator[Piece | None]:
        """All outputs from the first on, as they come.

        Args:
            ping: seconds; None is yielded whenever nothing has come for so long.

        Raises:
            Exception: why there are no more.
        """
        place = 0
        async for changed in self._changes(ping):
            if not changed:
                yield None
            while place < len(self._pieces):
                yield self._pieces[place]
                place += 1
            if self.failure is not None:
                raise self.failure
            if self.done:
                return

    async def result(self) -> list[Generation]:
        """The answers, once all are there.

        Raises:
            Exception: why there are none.
        """
        async for _ in self._changes():
            if self.failure is not None:
                raise self.failure
            if self.done:
                break
        return self.results

    @property
    def results(self) -> list[Generation]:
        """The answers so far."""
        return [one for one in self.answers if one is not None]

    def give_up(self) -> None:
        """Nobody listens any more."""
        self.fail(GivenUpError("nobody listens to the answer any more."))

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        if self.done:
            return
        if isinstance(error, VitaError):  # its message says all; frames that hold the body would wait for the collector
            error.__traceback__ = error.__context__ = error.__cause__ = None
        self.failure = error
        if self._task is not None:
            self._task.cancel()
        for request_id in self._running:
            self._loop.abort(request_id)
        self._running.clear()
        self._changed()
        self._ended(self)

    async def _begin(self, read: Read) -> None:
        try:
            self.request, prepared = await read()
        except Exception as error:  # its listeners raise it
            self.fail(error)
            return
        self.answers = [None] * len(prepared)
        for index, one in enumerate(prepared):
            self._running.add(one.request.id)
            self._loop.submit(one, lambda output, index=index: self._hear(index, output))  # type: ignore[misc]
        self._changed()

    def _hear(self, index: int, output: Output) -> None:
        if self.done:
            return
        self.first = self.first or time.monotonic()
        if output.outcome is not None:
            self._running.discard(output.request_id)
        if isinstance(output.outcome, VitaError):
            self.fail(output.outcome)
            return
        self._pieces.append(Piece(index, output))
        if output.outcome is not None:
            self.answers[index] = output.outcome
        self._changed()
        if self.done:
            self._ended(self)

    def _changed(self) -> None:
        for event in self._wake:
            event.set()

    async def _changes(self, ping: float | None = None) -> AsyncIterator[bool]:
        """True now and whenever something has changed; False after `ping` seconds without."""
        event = asyncio.Event()
        self._wake.add(event)
        try:
            yield True
            while True:
                with anyio.move_on_after(ping):
                    await event.wait()
                yield event.is_set()
                event.clear()
        finally:
            self._wake.discard(event)
