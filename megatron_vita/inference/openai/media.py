"""What an `image_url` or `video_url` names: a file below the media root, data in the request, or an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_vita.data.media.names import locate
from megatron_vita.data.rejects import code_of
from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import DataError
from megatron_vita.inference.openai.data_url import DataUrl
from megatron_vita.inference.openai.errors import RequestError
from megatron_vita.inference.openai.fields import shown

_MOST_PATH = 4096
"""Characters of a path: Linux takes no more bytes."""
Fetch = Callable[[str, str], bytes]
"""(http or https address, `image` or `video`) -> the bytes there. Raises RequestError."""


def is_address(url: str | DataUrl) -> bool:
    """Whether a URL would be fetched."""
    return isinstance(url, str) and url[:8].lower().startswith(("http://", "https://"))


def find_medium(
    url: str | DataUrl, place: str, kind: str, *, media_root: Path | None, fetch: Fetch | None, most_bytes: int
) -> MediaFile:
    """The picture or video that a URL names; found, not opened.

    Args:
        url: data URI, path below the media root, `file://` and such a path, or an address that is fetched.
        place: field of the body, for messages.
        kind: `image` or `video`.
        media_root: folder that no path may leave; None: no path is opened.
        fetch: downloads; None: addresses are refused.
        most_bytes: of a medium in the request.

    Raises:
        RequestError: nothing that may be opened.
    """
    if isinstance(url, DataUrl):
        return url.medium(place, kind, most_bytes)
    scheme = url[: url.index(":")].lower() if ":" in url[:12] else ""
    if scheme == "data":
        return DataUrl.parse(url).medium(place, kind, most_bytes)
    if scheme in ("http", "https") and fetch is not None:
        try:
            return MediaFile(data=fetch(url, kind), label=place)
        except RequestError as error:
            raise RequestError(f"{place}: {error}", param=place, code=error.code) from None
    if scheme in ("http", "https", "ftp", "s3"):
        raise RequestError(
            f"{place} is an address on the network ({scheme}), which is not downloaded. Give a path below the media "
            "root or a data URI; or let the server download http and https (--allow-fetch).",
            param=place,
            code="media_remote",
        )
    path = url
    if scheme == "file":
        try:
            parsed = urlsplit(url)
        except ValueError as error:  # what is in brackets is no address
            raise RequestError(f"{place} is no URL: {error}.", param=place, code="media_missing") from None
        if parsed.netloc not in ("", "localhost"):
            raise RequestError(f"{place} names a file of another host.", param=place, code="media_remote")
        path = unquote(parsed.path)
    if media_root is None:
        raise RequestError(
            f"{place} is a path, but no folder of media is open. Set --media-root, or give a data URI.",
            param=place,
            code="media_missing",
        )
    try:
        found = locate(os.path.realpath(media_root), path) if len(path) <= _MOST_PATH else None
    except DataError as error:
        code, message = code_of(error)
        raise RequestError(f"{place}: {message}", param=place, code=code) from None
    if found is None:
        raise RequestError(f"{place}: {shown(path)!a} is not there.", param=place, code="media_missing")
    return MediaFile(path=found, label=path)
