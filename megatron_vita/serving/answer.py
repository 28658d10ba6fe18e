"""Answers one HTTP request from its job: at once, or as a stream of server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megatron_vita.inference.openai import ApiRequest, Chunks, response
from megatron_vita.inference.prompt import Generation
from megatron_vita.serving.body import receive_body
from megatron_vita.serving.errors import status_and_object
from megatron_vita.serving.jobs import Job
from megatron_vita.serving.reader import Kind
from megatron_vita.serving.service import Service

log = logging.getLogger(__name__)

PING = 15.0
"""Seconds of silence after which a stream carries a comment, so that nothing in between closes it."""
READ_TIMEOUT = 60.0
"""Seconds that a client may take to read a piece of a stream."""
T = TypeVar("T")


async def answer(service: Service, request: Request, kind: Kind) -> Response:
    """The response to a POST.

    Raises:
        VitaError: why there is none.
        ClientDisconnect: nobody would read it.
    """
    service.check_open()
    body, digest = await receive_body(request, service.settings, service.pending)
    retried = request.headers.get("x-stainless-retry-count", "0") != "0"
    job = await service.job(kind, [body], digest, retried=retried)
    del body  # the job's reader has it
    streams = False
    try:
        asked = await _while_connected(request.receive, job.ready)
        if asked.stream:
            streams = True
            return _Events(service, job, kind, asked)
        answers = await _while_connected(request.receive, job.result)
        return JSONResponse(
            response(
                kind,
                answers,
                id=job.id,
                model=asked.model or service.model,
                spell=service.spell,
                prompts=asked.prompts,
                echo=asked.echo,
            )
        )
    finally:
        if not streams:
            service.leave(job)


class _Events(StreamingResponse):
    """A job's pieces as server-sent events. It stops at once when the client is gone, wherever it is."""

    def __init__(self, service: Service, job: Job, kind: Kind, asked: ApiRequest) -> None:
        self._service, self._job = service, job
        self._chunks = Chunks(
            kind,
            id=job.id,
            model=asked.model or service.model,
            spell=service.spell,
            include_usage=asked.include_usage,
            prompts=asked.prompts,
            echo=asked.echo,
        )
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient_send(message: Any) -> None:
            with anyio.fail_after(READ_TIMEOUT):
                await send(message)

        try:
            await _while_connected(receive, lambda: self.stream_response(patient_send))
        except (ClientDisconnect, TimeoutError):
            pass  # nobody reads
        finally:
            self._service.leave(self._job)

    async def _events(self) -> AsyncIterator[str]:
        try:
            for index in range(len(self._job.answers)):
                if (chunk := self._chunks.open(index)) is not None:
                    yield _event(chunk)
            async for piece in self._job.pieces(ping=PING):
                if piece is None:
                    yield ": the request waits or is being computed\n\n"
                    continue
                if (chunk := self._chunks.piece(piece.index, piece.output)) is not None:
                    yield _event(chunk)
                if isinstance(piece.output.outcome, Generation):
                    yield _event(self._chunks.close(piece.index, piece.output.outcome))
            if (chunk := self._chunks.usage(self._job.results)) is not None:
                yield _event(chunk)
        except Exception as error:  # the status line is sent: the stream itself says it
            status, body, _ = status_and_object(error)
            yield _event({"error": {**body["error"], "status": status}})
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _while_connected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """Do something, as long as the client is there to hear of it.

    Raises:
        ClientDisconnect: it is gone.
    """
    results: list[T] = []
    failed: list[Exception] = []

    async def watch(scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        try:
            results.append(await work())
        except Exception as error:  # raised below: a task group would wrap it
            failed.append(error)
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]
    if not results:
        raise ClientDisconnect
    return results[0]
