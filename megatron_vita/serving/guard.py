"""Lets in who has the key, and says to browsers what a response is."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_vita.serving.errors import HttpError, status_and_object

_OPEN = ("/", "/health", "/ready", "/info")
"""Paths that need no key, as the page's files below /page/: they tell whether the server is there, and how to ask."""


class Guard:
    """ASGI middleware, before anything of a request's body is read."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: Collection[str] | None) -> None:
        """Guard an application.

        Args:
            app: the application.
            api_key: what clients must send; None: nothing.
            hosts: names under which the server may be asked; None: any. Without it a page of another site, which has
                its own name point to this machine, could ask the server of whoever looks at it.
        """
        self._app, self._key, self._hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        error = self._error(Headers(scope=scope), scope["path"])
        if error is None:
            await self._app(scope, receive, send_guarded)
            return
        status, body, headers = status_and_object(error)
        await JSONResponse(body, status, headers)(scope, receive, send_guarded)

    def _error(self, headers: Headers, path: str) -> HttpError | None:
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name.lower() not in self._hosts:
            return HttpError(
                403,
                f"the server has not the name {name[:200]!a}. Allow it with --allowed-host.",
                code="host",
            )
        if self._key is None or _is_open(path) or _has_key(headers, self._key):
            return None
        return HttpError(
            401,
            "the API key is missing or wrong. Send Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith("/page/")


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()) and scheme.lower() == "bearer"
