"""Bodies become prepared prompts in a few threads, beside the thread in which the engine works."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from megatron_vita.inference.openai import ApiRequest, Limits, ReadOptions, chat_request, completion_request, parse_body
from megatron_vita.inference.prepare import Prepared
from megatron_vita.inference.prompt import Request
from megatron_vita.serving.fetch import fetch

log = logging.getLogger(__name__)

Kind = Literal["chat", "completion"]
THREADS = 2
"""Requests that are read at once; each may hold a body, its text and its media in memory."""
_MOST_WARNED = 1000
"""Field names that are warned of; a hostile client could invent names for ever."""


class Reader:
    """Reads and prepares requests."""

    def __init__(
        self,
        prepare: Callable[[Request, Limits | None, Prepared | None], Prepared],
        options: ReadOptions,
        *,
        fetch_timeout: float | None = None,
    ) -> None:
        """Start no thread yet.

        Args:
            prepare: `Engine.open`.
            options: how bodies are read.
            fetch_timeout: seconds for all downloads of a request; None: nothing is downloaded.
        """
        self._prepare, self._options, self._fetch_timeout = prepare, options, fetch_timeout
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
        self._warned: set[str] = set()

    async def read(self, kind: Kind, box: list[bytes], id: str) -> tuple[ApiRequest, list[Prepared]]:
        """Read a body and prepare its requests.

        Args:
            kind: of the endpoint.
            box: holds the body, which is taken out of it: bytes that are read are not kept.
            id: of the job.

        Raises:
            VitaError: what is wrong with it.
        """
        abandoned = threading.Event()
        future = self._pool.submit(self._read, kind, box, id, abandoned)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            abandoned.set()
            future.add_done_callback(_close)
            raise

    def close(self) -> None:
        """Let the threads end; what waits is not read."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(
        self, kind: Kind, box: list[bytes], id: str, abandoned: threading.Event
    ) -> tuple[ApiRequest, list[Prepared]]:
        if abandoned.is_set():
            return ApiRequest((), None, False), []
        body = parse_body(box.pop(), self._options.limits)
        request = (chat_request if kind == "chat" else completion_request)(body, id=id, options=self._own_options())
        del body
        for warning in request.warnings:
            if warning not in self._warned and len(self._warned) < _MOST_WARNED:
                self._warned.add(warning)
                log.warning("%s (said once)", warning)
        prepared: list[Prepared] = []
        try:
            for one in request.requests:
                if abandoned.is_set():
                    break
                like = prepared[-1] if prepared and prepared[-1].request.sample is one.sample else None
                prepared.append(self._prepare(one, self._options.limits, like))
        except BaseException:
            for one_prepared in prepared:
                one_prepared.media.close()
            raise
        return request, prepared

    def _own_options(self) -> ReadOptions:
        """Options of one request, whose downloads share their time."""
        if self._fetch_timeout is None:
            return self._options
        end = time.monotonic() + self._fetch_timeout
        most = (self._options.limits or Limits()).picture_bytes

        def download(url: str, kind: str) -> bytes:
            return fetch(url, kind, limit_bytes=most, timeout=max(0.1, end - time.monotonic()))

        return replace(self._options, fetch=download)


def _close(future: Future[tuple[ApiRequest, list[Prepared]]]) -> None:
    """Let go of the media of a request that nobody waits for."""
    if not future.cancelled() and future.exception() is None:
        for prepared in future.result()[1]:
            prepared.media.close()
