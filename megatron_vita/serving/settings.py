"""Settings of the server. Nothing here imports torch or FastAPI: a command line is checked before it is slow."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vita.errors import ConfigError
from megatron_vita.inference.openai.limits import Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Where the server listens, whom it answers, and how much of what it takes."""

    host: str = "127.0.0.1"
    """Address to listen on; one that is not loopback needs an API key."""
    port: int = 8000
    """0: a free one, which is printed."""
    api_key: str | None = None
    """What a client sends as `Authorization: Bearer KEY`; None: anybody on this machine is answered."""
    allowed_hosts: tuple[str, ...] = ()
    """More names under which the server may be asked without a key, such as that of a reverse proxy."""
    model_name: str | None = None
    """What /v1/models calls the model; None: the name of its stage or folder."""
    media_root: Path | None = None
    """Folder that `file://` addresses are below; None: they are refused."""
    allow_fetch: bool = False
    """Download http(s) addresses of pictures and videos, never from private addresses."""
    fetch_timeout: float = 60.0
    """Seconds that all downloads of a request may take together."""
    limits: Limits = field(default_factory=Limits)
    """What one request may hold."""
    max_queue: int = 256
    """Requests that may wait; one more is told to come back later (429)."""
    max_pending_bytes: int = 8 << 30
    """Bytes of the bodies of all requests that wait or run; one more is told to come back later (429)."""
    max_connections: int = 1000
    """Connections that are open at once; one more is closed."""
    header_timeout: float = 30.0
    """Seconds that a connection may be silent, and that sending a request's head may take."""
    body_rate: int = 100 << 10
    """Bytes a second that a body must come with, on average, once `header_timeout` seconds have passed."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must lie between 0 and 65535.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("--api-key: printable ASCII characters, at least one.")
        if not self.loopback and self.api_key is None:
            raise ConfigError(
                f"--host {self.host}: other machines could reach the server. Set --api-key, or listen on 127.0.0.1."
            )
        for name in ("max_queue", "max_pending_bytes", "max_connections", "body_rate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1.")
        for name in ("fetch_timeout", "header_timeout", "drain_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: seconds, at least 0.")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ConfigError(f"--media-root {self.media_root}: no such folder.")

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names under which the server may be asked, in lower case; None: any, for a key is asked for."""
        if self.api_key is not None:
            return None
        own = ("localhost", "127.0.0.1", "[::1]", self.host, f"[{self.host}]", *self.allowed_hosts)
        return frozenset(name.lower() for name in own)

    @property
    def loopback(self) -> bool:
        """Only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
