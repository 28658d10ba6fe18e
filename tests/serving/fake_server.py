"""A server without a model: it streams what the test says, in OpenAI's form, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from megatron_vita.serving.page import page_router

SLOW = "Write without end"
"""A question whose answer begins, and goes on until the reader leaves."""


@dataclass
class FakeServer:
    """What it says, and what it heard."""

    answers: dict[str, str] = field(default_factory=dict)
    """Question -> answer; others are echoed."""
    info: dict[str, Any] = field(default_factory=dict)
    """Over the usual fields of /info."""
    key: str | None = None
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """(status, body, headers) of the next responses."""
    broken: bool = False
    """Streams end in the middle."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """The reader of a slow answer is gone."""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router())

        @app.get("/info")
        def info() -> dict[str, Any]:
            usual = {"model": "digits-1b", "state": "ready", "max_model_len": 2048, "vision": True, "limits": {}}
            return {**usual, "api_key": self.key is not None, **self.info}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "the API key is missing or wrong."}}, 401)
            if self.refusals:
                status, body, headers = self.refusals.pop(0)
                return JSONResponse(body, status, headers)
            self.bodies.append(await request.json())
            return StreamingResponse(self._stream(self.bodies[-1]), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        answer = self.answers.get(question, f"You said: {question}")
        yield ": the request waits\n\n"
        yield _event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        pieces = [answer[i : i + 7] for i in range(0, len(answer), 7)]
        for number, piece in enumerate(pieces):
            if self.broken and number == 1:
                return
            yield _event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
            await anyio.sleep(0)
        if question == SLOW:
            try:
                await anyio.sleep_forever()
            finally:
                self.left.set()
        yield _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        usage = {"prompt_tokens": 1234, "completion_tokens": len(pieces), "total_tokens": 1234 + len(pieces)}
        yield _event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"


def _event(**fields: Any) -> str:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "digits-1b", **fields}
    return f"data: {json.dumps(chunk)}\n\n"
