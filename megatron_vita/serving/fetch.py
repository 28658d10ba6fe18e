"""Downloads a picture or video from a public address, and from no other.

A name is resolved once: every address that it has is checked, and one of these is connected to, so that no second
answer of a name server can lead elsewhere. Redirects are followed one by one, each checked like the first address.
Nothing of the environment (proxies, .netrc) is used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpcore
import httpx

from megatron_vita import __version__
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import shown

MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_URL = 4096
"""Characters of an address."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that a gateway leads to the IPv4 address in their last 32 bits (RFC 6052)."""

Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) -> its addresses, as text. Raises OSError."""


def fetch(
    url: str,
    kind: str,
    *,
    limit_bytes: int,
    timeout: float,
    resolve: Resolve | None = None,
    allowed: Callable[[str], bool] | None = None,
) -> bytes:
    """Download a picture or video.

    Args:
        url: http or https.
        kind: `image` or `video`; the server must say that it sends one, or bytes without a type of their own
            (application/octet-stream).
        limit_bytes: most bytes.
        timeout: seconds that it may take in all, redirects included.
        resolve: finds the addresses of a host; None: the system's resolver.
        allowed: says whether an address may be connected to; None: `is_public`.

    Raises:
        RequestError: another address, no answer, or not what was asked for. It does not say what the name leads to.
    """
    deadline = time.monotonic() + timeout
    network = _CheckedNetwork(resolve or _resolve, allowed or is_public, deadline)
    try:
        with httpcore.ConnectionPool(network_backend=network, max_connections=1) as pool:
            target = _parsed(url)
            for _ in range(MOST_REDIRECTS + 1):
                found = _get(pool, target, kind, limit_bytes)
                if isinstance(found, bytes):
                    return found
                target = found
        raise _error(url, f"it is redirected more than {MOST_REDIRECTS} times.")
    except _NotPublicError:
        raise _error(url, "it does not lead to a public address.") from None
    except httpcore.TimeoutException:
        raise _error(url, f"it does not answer within {timeout:g} seconds.") from None
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
        OSError,
        UnicodeError,
    ) as error:
        raise _error(url, f"it cannot be fetched ({type(error).__name__}).") from None


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; an IPv4 address within an IPv6 address counts as itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped
        if mapped is not None:
            return is_public(str(mapped))
        inner = ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None and not is_public(str(inner)):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)


class _NotPublicError(Exception):
    """An address that nobody may be led to."""


def _get(pool: httpcore.ConnectionPool, url: httpx.URL, kind: str, limit_bytes: int) -> bytes | httpx.URL:
    """The bytes there, or where it is redirected to."""
    headers: dict[bytes | str, bytes | str] = {
        "Host": url.netloc.decode("ascii"),
        "User-Agent": f"megatron_vita/{__version__}",
        "Accept": f"{kind}/*, application/octet-stream;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    with pool.stream("GET", target, headers=headers) as answer:
        told = httpx.Headers(answer.headers)
        if answer.status in _REDIRECTS and "location" in told:
            return _parsed(told["location"], url)
        if answer.status != 200:
            raise _error(str(url), f"the server there answers with status {answer.status}.")
        media_type = told.get("content-type", "").partition(";")[0].strip().lower()
        if not media_type.startswith(f"{kind}/") and media_type != "application/octet-stream":
            raise _error(str(url), f"it is of type {shown(media_type)!a}, not {kind}/...")
        if told.get("content-encoding", "identity").lower() != "identity":
            raise _error(str(url), "it comes compressed, though it was asked for as it is.")
        length = told.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:18]) > limit_bytes:
            raise _too_large(url, limit_bytes)
        parts: list[bytes] = []
        size = 0
        for part in answer.iter_stream():
            size += len(part)
            if size > limit_bytes:
                raise _too_large(url, limit_bytes)
            parts.append(part)
    return b"".join(parts)


def _parsed(url: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        if len(url) > _MOST_URL:
            raise _error(url, f"it is longer than {_MOST_URL} characters.")
        found = httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise _error(url, f"it is no address ({error}).") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise _error(url, "it is no http(s) address.")
    if found.userinfo:
        raise _error(url, "it holds a user name or password.")
    return found.copy_with(fragment=None)


def _error(url: str, why: str) -> RequestError:
    return RequestError(f"{shown(url)!a}: {why}", code="media_remote")


def _too_large(url: httpx.URL, limit_bytes: int) -> RequestError:
    return _error(str(url), f"it has more bytes than {limit_bytes}, the limit (picture_bytes).")


def _resolve(host: str, port: int) -> Sequence[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to addresses that were checked, until a time."""

    def __init__(self, resolve: Resolve, allowed: Callable[[str], bool], deadline: float) -> None:
        self._resolve, self._allowed, self._deadline = resolve, allowed, deadline
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to an address of a host, if all that it has are allowed."""
        addresses = self._resolve(host.strip("[]"), port)
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise _NotPublicError
        stream = self._plain.connect_tcp(addresses[0], port, _left(self._deadline), local_address, socket_options)
        return _TimedStream(stream, self._deadline)

    def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Never."""
        raise _NotPublicError

    def sleep(self, seconds: float) -> None:
        """Of retries, which there are none of."""
        raise NotImplementedError


class _TimedStream(httpcore.NetworkStream):
    """A connection that is over at a time, however slowly its bytes come."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    """Seconds until then. Raises httpcore.TimeoutException if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("too late")
    return left
