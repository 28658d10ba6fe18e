"""The server's state: jobs that are answered, who may wait, and whether the engine is there."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from megatron_vita.errors import VitaError
from megatron_vita.files import release_memory
from megatron_vita.serving.body import Pending
from megatron_vita.serving.errors import HttpError
from megatron_vita.serving.jobs import Job
from megatron_vita.serving.metrics import Metrics
from megatron_vita.serving.settings import ServerSettings

if TYPE_CHECKING:
    from megatron_vita.inference.engine import Engine
    from megatron_vita.serving.engine_loop import EngineLoop
    from megatron_vita.serving.reader import Kind, Reader

log = logging.getLogger(__name__)

REST = 1.0
"""Seconds without a request after which memory is given back."""
State = Literal["loading", "ready", "draining", "failed"]


class Service:
    """What the routes share. All but `__init__` runs in the event loop's thread."""

    def __init__(self, settings: ServerSettings, model: str) -> None:
        """Nothing is loaded.

        Args:
            settings: of the server.
            model: its name for clients.
        """
        self.settings = settings
        self.model = settings.model_name or model
        self.metrics = Metrics()
        self.pending = Pending(settings.max_pending_bytes)
        self.state: State = "loading"
        self.begun = int(time.time())
        self.loaded = threading.Event()
        """Set once the model is loaded, or will not be."""
        self.stop: Callable[[], None] = self.drain
        """Begins to drain, and to end the server once it runs; any thread may call it."""
        self._engine: Engine | None = None
        self._loop: EngineLoop | None = None
        self._reader: Reader | None = None
        self._jobs: dict[bytes, Job] = {}  # those that run, by digest of their body
        self._all: set[Job] = set()
        self._seconds = 1.0  # that a request takes, of late
        self._resting: asyncio.TimerHandle | None = None

    def attach(self, engine: Engine, loop: EngineLoop, reader: Reader) -> None:
        """The model is loaded."""
        self._engine, self._loop, self._reader = engine, loop, reader
        if self.state == "loading":
            self.state = "ready"
        self.loaded.set()

    def drain(self) -> None:
        """Take no new request."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    def lose(self, error: Exception) -> None:
        """The engine is gone: every request fails, and so will every new one."""
        self.state = "failed"
        self.loaded.set()
        lost = HttpError(503, f"the engine has ended: {error}", headers={"Retry-After": "30"})
        for job in list(self._all):
            job.fail(lost)

    def finish(self) -> None:
        """Fail what is not answered by now, because the server ends."""
        for job in list(self._all):
            job.fail(HttpError(503, "the server ends. Send the request again.", headers={"Retry-After": "5"}))
        if self._reader is not None:
            self._reader.close()

    def check_open(self) -> None:
        """Prove that a request could be taken now; before its body is read.

        Raises:
            HttpError: 503 or 429.
        """
        if self.state != "ready":
            words = {
                "loading": "the model is being loaded",
                "draining": "the server ends",
                "failed": "the engine has ended",
            }
            raise HttpError(
                503, f"{words[self.state]}. Send the request again.", code=self.state, headers={"Retry-After": "10"}
            )
        waiting, most = self.waiting, self.settings.max_queue
        if waiting >= most:
            seconds = min(60, max(1, round(self._seconds)))
            raise HttpError(
                429,
                f"{waiting} requests wait, and max_queue={most} is the limit. Send this one again in {seconds} s.",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    async def job(self, kind: Kind, box: list[bytes], digest: bytes, *, retried: bool) -> Job:
        """The job that answers a body: a new one, or one that runs already with the same body.

        Joining changes no answer where the answer is decided by the body (temperature 0, or a seed); a request that
        draws its own seed is joined only by one that says that it is a retry.

        Args:
            kind: of the endpoint.
            box: holds the body, accounted for in `pending`; it is taken out, so that no bytes are kept that are read.
            digest: of path and body.
            retried: the client says that it sends the request again.
        """
        size = len(box[0])
        try:
            known = await self._joined(digest, retried=retried)
            if known is not None:
                self.pending.give(size)
                self.metrics.joined.inc()
                return known
            self.check_open()
        except BaseException:
            self.pending.give(size)
            raise
        assert self._loop is not None, "the state is ready"
        assert self._reader is not None, "the state is ready"
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        job = Job(f"{prefix}-{uuid.uuid4().hex}", self._loop, size)
        self._jobs[digest] = job
        self._all.add(job)
        job.listeners = 1
        reader = self._reader

        def ended(one: Job) -> None:
            self._all.discard(one)
            self.pending.give(one.size)
            if self._jobs.get(digest) is one:
                del self._jobs[digest]
            self._count(one)
            if not self._all:
                self._rest()

        job.start(lambda: reader.read(kind, box, job.id), ended)
        return job

    async def _joined(self, digest: bytes, *, retried: bool) -> Job | None:
        """The running job that a request with this body may join, with one listener more."""
        known = self._jobs.get(digest)
        if known is None or known.done:
            return None
        known.listeners += 1  # it must not be given up while its request is looked at
        try:
            request = await known.ready()
        except VitaError:
            return known  # which says what is wrong
        except BaseException:
            self.leave(known)
            raise
        if retried or request.seeded or all(one.sampling.temperature == 0 for one in request.requests):
            return known
        self.leave(known)
        return None

    def leave(self, job: Job) -> None:
        """A client has heard enough; the last one to leave gives up what is not answered."""
        job.listeners -= 1
        if job.listeners == 0 and not job.done:
            self.metrics.cancelled.inc()
            job.give_up()

    def _rest(self) -> None:
        """Let memory go that requests took, once none has come for a while: the C library would keep it."""
        if self._resting is not None:
            self._resting.cancel()
        events = asyncio.get_running_loop()

        def release() -> None:
            if not self._all:
                events.run_in_executor(None, release_memory)

        self._resting = events.call_later(REST, release)

    @property
    def waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(job.first is None for job in self._all)

    @property
    def longest(self) -> int | None:
        """Most tokens of a prompt with its answer; None before the model is loaded."""
        return self._engine.worker.longest if self._engine is not None else None

    @property
    def vision(self) -> bool:
        """The model looks at pictures."""
        return self._engine is not None and self._engine.config.vision is not None

    def spell(self, token: int) -> bytes:
        """Bytes that a token adds to a text."""
        assert self._engine is not None, "the state is ready"
        return self._engine.tokenizer.token_bytes(token)

    def describe(self) -> dict[str, Any]:
        """OpenAI's object of the model, with vLLM's max_model_len."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.begun,
            "owned_by": "megatron_vita",
            "max_model_len": self.longest,
        }

    def refused(self, path: str, status: int, error: Exception) -> None:
        """Write down a client's mistake."""
        log.info("%s: %d: %.300s", path, status, ascii(str(error)))

    def metrics_text(self) -> bytes:
        """All metrics, as of now."""
        waiting = self.waiting
        self.metrics.waiting.set(waiting)
        self.metrics.running.set(len(self._all) - waiting)
        self.metrics.pending.set(self.pending.held)
        if self._loop is not None:
            stats = self._loop.stats
            self.metrics.sequences_waiting.set(stats.waiting)
            self.metrics.sequences_running.set(stats.running)
            self.metrics.cache.set(stats.cache_usage)
            self.metrics.preemptions.set(stats.preemptions)
            self.metrics.step_age.set(time.monotonic() - self._loop.stepped)
        return self.metrics.text()

    def _count(self, job: Job) -> None:
        answers = job.results
        if job.failure is not None or not answers:
            if job.failure is not None and not isinstance(job.failure, VitaError):
                log.error("request %s failed", job.id, exc_info=job.failure)
            return
        now = time.monotonic()
        self._seconds = 0.8 * self._seconds + 0.2 * (now - job.begun)
        tokens = sum(len(one.ids) for one in answers)
        first = (job.first or now) - job.begun
        self.metrics.answered(prompt=answers[0].prompt_tokens, answer=tokens, first=first, duration=now - job.begun)
        log.info(
            "%s: prompt %d, answer %d tokens, first token %.2f s, %.2f s", job.id[:16], answers[0].prompt_tokens,
            tokens, first, now - job.begun,
        )  # fmt: skip
