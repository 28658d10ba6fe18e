"""The thread in which an engine works: requests come in from any thread, outputs go out after every step.

While there is nothing to do the leader still makes a step now and then, in which the ranks hear from each other: so the
others do not time out, and a rank that died is noticed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_vita.errors import VitaError
from megatron_vita.inference.prompt import Output

if TYPE_CHECKING:
    from megatron_vita.inference.engine import EngineStats
    from megatron_vita.inference.prepare import Prepared

HEARTBEAT = 0.5
"""Seconds between two steps of an idle engine."""

Sink = Callable[[Output], None]
"""Hears the outputs of one request, in the thread that `Post` leads to."""
Post = Callable[[Callable[[], None]], object]
"""Runs something in another thread soon, such as `asyncio.AbstractEventLoop.call_soon_threadsafe`."""


class SteppingEngine(Protocol):
    """What the loop needs of an Engine."""

    @property
    def busy(self) -> bool:
        """Requests wait or run."""

    def enqueue(self, prepared: Prepared) -> None:
        """Take a request."""

    def abort(self, request_id: str) -> None:
        """Give up a request."""

    def step(self, *, stream: bool = True) -> list[Output]:
        """One forward pass."""

    def pause(self) -> None:
        """Let the other ranks go."""

    def stats(self) -> EngineStats:
        """Queue and cache."""


class EngineLoop:
    """Steps of one engine."""

    def __init__(self, engine: SteppingEngine, post: Post, *, heartbeat: float = HEARTBEAT) -> None:
        """`run` does the work.

        Args:
            engine: on rank 0; from now on only the thread of `run` touches it, but for `Engine.open`.
            post: leads outputs to the thread that reads them.
            heartbeat: seconds between two steps of an idle engine.
        """
        self._engine, self._post, self._heartbeat = engine, post, heartbeat
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._stopping = threading.Event()
        self.stats = engine.stats()
        """As of the last step; replaced as a whole."""
        self.stepped = time.monotonic()
        """Time of the last step's end."""

    def submit(self, prepared: Prepared, sink: Sink) -> None:
        """Let the engine answer a request; the sink hears every output, the last one with an outcome."""

        def begin() -> None:
            try:
                self._engine.enqueue(prepared)
            except VitaError as error:
                prepared.media.close()
                output = Output(prepared.request.id, "", error)
                self._post(lambda: sink(output))
                return
            self._sinks[prepared.request.id] = sink

        self._commands.put(begin)

    def abort(self, request_id: str) -> None:
        """Give up a request: its blocks are free after the next step, and its sink hears nothing more."""

        def end() -> None:
            if self._sinks.pop(request_id, None) is not None:
                self._engine.abort(request_id)

        self._commands.put(end)

    def stop(self) -> None:
        """Let `run` return once the step that is going on is done. What is not answered by then is given up."""
        self._stopping.set()
        self._commands.put(lambda: None)

    def run(self) -> None:
        """Work until `stop` is called.

        Raises:
            VitaError: another rank has ended; after any error the engine cannot go on.
        """
        while True:
            self._obey()
            if self._stopping.is_set():
                for request_id in list(self._sinks):
                    self._engine.abort(request_id)
                self._engine.pause()
                return
            outputs = self._engine.step()
            self.stats, self.stepped = self._engine.stats(), time.monotonic()
            heard = [(self._sinks[one.request_id], one) for one in outputs if one.request_id in self._sinks]
            for output in outputs:
                if output.outcome is not None:
                    self._sinks.pop(output.request_id, None)
            if heard:
                self._post(lambda heard=heard: _tell(heard))  # type: ignore[misc]

    def _obey(self) -> None:
        """Carry out what was asked for; an idle engine waits for it, no longer than a heartbeat."""
        try:
            if not self._engine.busy:
                self._commands.get(timeout=self._heartbeat)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return


def _tell(heard: Sequence[tuple[Sink, Output]]) -> None:
    for sink, output in heard:
        sink(output)
