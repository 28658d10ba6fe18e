"""Receives the body of a request: no more bytes than allowed, no slower than allowed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
from starlette.requests import Request

from megatron_vita.serving.errors import HttpError
from megatron_vita.serving.settings import ServerSettings


@dataclass(slots=True)
class Pending:
    """Bytes of bodies that are held for requests which are not answered yet."""

    most: int
    held: int = 0

    def take(self, count: int) -> None:
        """Account for bytes.

        Raises:
            HttpError: 429, there is no room for them now.
        """
        if self.held + count > self.most:
            raise HttpError(
                429,
                f"the bodies of waiting requests fill {self.held} of {self.most} bytes. Send this one again later.",
                code="queue_full",
            )
        self.held += count

    def give(self, count: int) -> None:
        """Bytes are gone."""
        self.held -= count


async def receive_body(request: Request, settings: ServerSettings, pending: Pending) -> tuple[bytes, bytes]:
    """The whole body of a request and its SHA-256. Its bytes are accounted for in `pending`, also by its caller.

    Raises:
        HttpError: 413 or 429 as soon as it is known to be too large; 408 if it comes too slowly; 415 if it is no JSON.
        starlette.requests.ClientDisconnect: the client is gone.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":  # also what keeps other sites' forms out of a browser on this machine
        raise HttpError(415, f"the body is of type {content_type[:80]!a}; send Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "the body is compressed; send it as it is.")
    limit = settings.limits.body_bytes
    told = request.headers.get("content-length", "0")
    stream = request.stream()
    if told.isdigit() and int(told[:20]) > limit:
        with anyio.move_on_after(settings.header_timeout):
            await _discard(stream, limit)
        raise _too_large(int(told[:20]), limit)
    parts: list[bytes] = []
    digest, size, begun = hashlib.sha256(request.url.path.encode()), 0, time.monotonic()
    try:
        while True:
            left = begun + settings.header_timeout + size / settings.body_rate - time.monotonic()
            try:
                with anyio.fail_after(max(0.0, min(settings.header_timeout, left))):
                    part = await anext(stream, None)
            except TimeoutError:
                raise HttpError(
                    408, f"{size} bytes of the body came in {time.monotonic() - begun:.0f} seconds. Send it faster."
                ) from None
            if part is None:
                break
            if size + len(part) > limit:
                with anyio.move_on_after(settings.header_timeout):
                    await _discard(stream, limit)
                raise _too_large(size + len(part), limit)
            pending.take(len(part))
            size += len(part)
            digest.update(part)
            parts.append(part)
        return b"".join(parts), digest.digest()
    except BaseException:
        pending.give(size)
        raise


async def _discard(stream: AsyncIterator[bytes], most: int) -> None:
    """Read on, as far as a limit, and keep nothing: a client that sends does not read why it is refused."""
    async for part in stream:
        most -= len(part)
        if most < 0:
            return


def _too_large(size: int, limit: int) -> HttpError:
    return HttpError(
        413, f"the body has {size} bytes or more, but body_bytes={limit} is the limit. Send less.", code="body_bytes"
    )
