"""uvicorn's HTTP/1.1, which gives up on connections that never finish a request's head, and on too many of them."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_vita.serving.settings import ServerSettings


def protocol_class(settings: ServerSettings) -> type[asyncio.Protocol]:
    """A class for `uvicorn.Config(http=...)`."""

    class PatientProtocol(H11Protocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.close()
            else:
                self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            """Let the time run while no request is being received or answered."""
            idle = self.cycle is None or self.cycle.response_complete
            if not idle and self._head is not None:
                self._head.cancel()
                self._head = None
            elif idle and self._head is None:
                self._head = self.loop.call_later(settings.header_timeout, self._late)

        def _late(self) -> None:
            self._head = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return PatientProtocol
