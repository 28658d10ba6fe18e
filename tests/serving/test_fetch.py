"""Downloads: from public addresses alone, whatever names and redirects say, and no more than allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_vita.inference.openai import RequestError
from megatron_vita.serving.fetch import fetch, is_public

BYTES = b"picture" * 1000


class Handler(BaseHTTPRequestHandler):
    """A server of bad manners."""

    seen: list[str]
    end: threading.Event

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer as the path says."""
        self.seen.append(self.headers["Host"])
        path, _, argument = self.path.lstrip("/").partition("?")
        if path == "to":
            return self._send(302, {"Location": argument}, b"")
        if path == "loop":
            return self._send(302, {"Location": f"/loop?{int(argument or 0) + 1}"}, b"")
        if path == "status":
            return self._send(404, {"Content-Type": "image/png"}, b"")
        if path == "silent":
            self.end.wait(60)
            return None
        if path == "endless":
            self._send(200, {"Content-Type": "image/png"}, b"", length=None)
            while not self.wfile.closed:
                try:
                    self.wfile.write(BYTES)
                except OSError:
                    break
            return None
        if path == "short":
            return self._send(200, {"Content-Type": "image/png"}, BYTES[:5], length=100)
        if path == "huge":
            return self._send(200, {"Content-Type": "image/png"}, BYTES[:5], length=10**12)
        kind = {"": "image/png", "bytes": "application/octet-stream", "clip": "video/mp4"}.get(path, "text/html")
        return self._send(200, {"Content-Type": f"{kind}; charset=x"}, BYTES)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = -1) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    Handler.seen, Handler.end = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        Handler.end.set()
        server.shutdown()
        thread.join()


def here(host: str, port: int) -> Sequence[str]:
    return {"public.example": ["127.0.0.1"], "both.example": ["8.8.8.8", "10.0.0.1"]}.get(host, [host])


def get(server: ThreadingHTTPServer, path: str, kind: str = "image", **more: Any) -> bytes:
    """Where 127.0.0.1 counts as public."""
    options = {
        "limit_bytes": 10_000, "timeout": 30.0, "resolve": here,
        "allowed": lambda address: address == "127.0.0.1" or is_public(address),
    }  # fmt: skip
    return fetch(f"http://public.example:{server.server_port}/{path}", kind, **{**options, **more})


def test_media_are_fetched(server: ThreadingHTTPServer) -> None:
    Handler.seen.clear()
    assert get(server, "") == get(server, "bytes") == get(server, "clip", "video") == BYTES
    assert get(server, "to?/") == BYTES
    assert set(Handler.seen) == {f"public.example:{server.server_port}"}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("page", "of type 'text/html'"), ("clip", "of type 'video/mp4'"), ("status", "status 404"),
        ("loop", "more than 3 times"), ("endless", "more bytes than 10000"), ("huge", "more bytes than 10000"),
        ("short", "cannot be fetched"), ("to?http://10.0.0.1/", "public address"),
        ("to?http://both.example/", "public address"), ("to?http://[::ffff:10.0.0.1]/", "public address"),
        ("to?file:///etc/passwd", "no http"), ("to?http://a:b@public.example/", "user name"),
        ("to?http://2130706433/", "public address"),
    ],
)  # fmt: skip
def test_what_else_there_is_is_refused(server: ThreadingHTTPServer, path: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as error:
        get(server, path)
    assert error.value.code == "media_remote"


def test_a_silent_server_is_waited_for_as_long_as_said(server: ThreadingHTTPServer) -> None:
    with pytest.raises(RequestError, match=r"does not answer within 0\.05 seconds"):
        get(server, "silent", timeout=0.05)


def test_this_machine_is_no_public_address(server: ThreadingHTTPServer) -> None:
    """With the real resolver and the real rule."""
    Handler.seen.clear()
    for host in ("127.0.0.1", "localhost", "0", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1"):
        with pytest.raises(RequestError):
            fetch(f"http://{host}:{server.server_port}/", "image", limit_bytes=9, timeout=30)
    assert Handler.seen == []


def test_a_name_is_resolved_once(server: ThreadingHTTPServer) -> None:
    """A name server whose second answer is another address has no second question."""
    answers = [["127.0.0.1"]]
    assert get(server, "", resolve=lambda host, port: answers.pop()) == BYTES
    assert answers == []


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "ftp://a/b", "http://", "http:///a", "http://\ud800/", "http://" + "a" * 5000, "http://a:99999/",
        "http://a b/", "data:image/png;base64,QQ==", "http://%00/", "http://[", "http://[::1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_named(url: str) -> None:
    def nobody(host: str, port: int) -> Sequence[str]:
        raise OSError

    with pytest.raises(RequestError):
        fetch(url, "image", limit_bytes=9, timeout=30, resolve=nobody)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("10.0.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("192.168.1.1", False),
        ("172.16.0.1", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False),
        ("255.255.255.255", False), ("::", False), ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("ff02::1", False), ("::ffff:127.0.0.1", False), ("::ffff:a00:1", False), ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False), ("2001:0:4136:e378:8000:63bf:f5ff:fffe", False), ("", False), ("name", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
