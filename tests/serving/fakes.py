"""An engine without a model behind a real server: it answers with the question's words, one a step."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_vita.data.example import Example
from megatron_vita.data.sample import Text
from megatron_vita.errors import VitaError
from megatron_vita.inference.engine import EngineStats
from megatron_vita.inference.openai import Limits
from megatron_vita.inference.prepare import Prepared
from megatron_vita.inference.prompt import Generation, Output, Request
from megatron_vita.serving.run import serve_engine
from megatron_vita.serving.service import Service
from megatron_vita.serving.settings import ServerSettings


class FakeMedia:
    """Media of a request: says whether they were let go."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass
class Running:
    """A request that is answered."""

    prepared: Prepared
    words: list[str]
    told: int = 0


@dataclass
class FakeEngine:
    """What EngineLoop, Reader and Service use of an Engine."""

    gate: threading.Semaphore | None = None
    """If set, a step that answers waits for it: the test decides when tokens come."""
    most: int = 8
    config: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=300, vision=object()))
    tokenizer: Any = field(
        default_factory=lambda: SimpleNamespace(
            token_bytes=lambda token: bytes([token % 256]), template=SimpleNamespace(options=frozenset())
        )
    )
    worker: Any = field(default_factory=lambda: SimpleNamespace(longest=1000))
    running: dict[str, Running] = field(default_factory=dict)
    media: list[FakeMedia] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    paused: bool = False
    steps: int = 0
    failing: Exception | None = None

    def open(self, request: Request, limits: Limits | None = None, like: Prepared | None = None) -> Prepared:
        self.media.append(FakeMedia())
        example = Example(np.zeros(10, dtype=np.int32), np.zeros(10, dtype=np.int32))
        return Prepared(request, example, self.media[-1], ())  # type: ignore[arg-type]

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def enqueue(self, prepared: Prepared) -> None:
        words = words_of(prepared.request)
        self.running[prepared.request.id] = Running(prepared, words)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id).prepared.media.close()

    def step(self, *, stream: bool = True) -> list[Output]:
        self.steps += 1
        if self.failing is not None:
            raise self.failing
        if not self.running:
            return []
        if self.gate is not None and not self.gate.acquire(timeout=0.05):
            return []
        outputs = []
        for request_id, one in list(self.running.items())[: self.most]:
            limit = one.prepared.request.max_new_tokens or 1 << 30
            words = one.words[:limit]
            text = "".join(words[one.told : one.told + 1])
            one.told += 1
            outcome = None
            if one.told >= len(words):
                reason = "length" if len(words) < len(one.words) else "stop"
                ids = tuple(range(len(words)))
                outcome = Generation("".join(words), ids, reason, prompt_tokens=10)  # type: ignore[arg-type]
                self.running.pop(request_id).prepared.media.close()
            outputs.append(Output(request_id, text, outcome))
        return outputs

    def pause(self) -> None:
        self.paused = True

    def stats(self) -> EngineStats:
        return EngineStats(0, len(self.running), len(self.running) / 100, 0)


def words_of(request: Request) -> list[str]:
    """Words of a request's last turn, each with the space behind it; what `fail` says makes the answer fail."""
    text = "".join(part.text for part in request.sample.messages[-1].parts if isinstance(part, Text))  # type: ignore[union-attr]
    return [word + " " for word in text.split()] or [""]


@contextmanager
def serving(engine: FakeEngine | Callable[[], Any], **settings: Any) -> Iterator[tuple[str, Service]]:
    """A server on a free port of loopback, in a thread; gives its address and state, and drains it at the end."""
    service = Service(ServerSettings(**{"drain_timeout": 5.0, **settings}), "tiny")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    load = engine if callable(engine) else lambda: engine
    failures: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(serve_engine(service, listener, load))  # type: ignore[arg-type]
        except VitaError as error:
            failures.append(error)

    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert service.loaded.wait(60), "the server does not start"
        yield address, service
    finally:
        service.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
