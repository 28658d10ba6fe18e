"""The web page of the server: static files of this package, under a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".mp4": "video/mp4",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing but this server's own files is loaded or run, nobody frames the page, and no form leaves it."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again with its ETag: a new version of the server brings its own page
}


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the page, in memory."""

    content: bytes
    media_type: str
    etag: str


def page_router() -> APIRouter:
    """Routes `/`, which is the page, and `/page/NAME`, which are its files; they need no API key.

    The page asks `GET /info` and `POST /v1/chat/completions` of the application that includes the router. Its addresses
    are relative, so it works below a prefix of a reverse proxy, too. The files are read once, here.
    """
    files = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        """The page."""
        return _answer(files["index.html"], request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def file(name: str, request: Request) -> Response:
        """A file of the page."""
        found = files.get(name)
        return Response(status_code=404, headers=HEADERS) if found is None else _answer(found, request)

    return router


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(file: _File, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
