"""Messages between a process and the one that decodes videos for it.

A message is the length of a JSON object, the object, and byte strings whose lengths the object names. No pickle: what a
decoder was made to do by a hostile file must not reach the process that trains.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

_HEADER = struct.Struct(">I")
_MOST_HEADER = 1 << 24
_PIECE = 1 << 20


class ClosedError(Exception):
    """The other side is gone, or does not speak this language."""


def send(
    link: socket.socket, message: dict[str, Any], blobs: Sequence[bytes] = (), idle: Callable[[], None] | None = None
) -> None:
    """Write one message.

    Args:
        link: a stream socket; with a timeout set, `idle` is called whenever that passes.
        message: plain values for JSON.
        blobs: byte strings that go with it.
        idle: may raise to give up.
    """
    header = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    for part in (_HEADER.pack(len(header)) + header, *blobs):
        view = memoryview(part)
        while view:
            try:
                view = view[link.send(view[:_PIECE]) :]
            except TimeoutError:
                if idle is not None:
                    idle()
            except OSError:
                raise ClosedError from None


def receive(link: socket.socket, idle: Callable[[], None] | None = None) -> tuple[dict[str, Any], list[bytes]]:
    """Read one message; see `send`.

    Raises:
        ClosedError: the other side closed the link, or what came is no message.
    """
    (length,) = _HEADER.unpack(_exactly(link, _HEADER.size, idle))
    if length > _MOST_HEADER:
        raise ClosedError
    try:
        message = json.loads(_exactly(link, length, idle))
        sizes = [int(size) for size in message.pop("blobs")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ClosedError from None
    return message, [_exactly(link, size, idle) for size in sizes]


def _exactly(link: socket.socket, size: int, idle: Callable[[], None] | None) -> bytes:
    out = bytearray()
    while len(out) < size:
        try:
            piece = link.recv(min(size - len(out), _PIECE))
        except TimeoutError:
            if idle is not None:
                idle()
            continue
        except OSError:
            raise ClosedError from None
        if not piece:
            raise ClosedError
        out += piece
        if idle is not None and len(out) < size:
            idle()
    return bytes(out)
