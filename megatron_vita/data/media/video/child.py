"""Child process that decodes videos: a hang, a crash or a lack of memory there does not affect its parent.

`worker.py` starts it and sends it messages over a connection; it exits as soon as the other end of that is closed. A
message is a JSON object and byte strings. No pickle: what a decoder was made to do by a hostile file must not reach the
process that trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megatron_vita.data.media.video.clip import VideoFile
from megatron_vita.data.media.video.decode import open_here
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError

_GRACE = 5.0
"""Seconds after the time limit at which the kernel ends this process, if the parent has not."""
_NO_MEMORY = ("cannot allocate memory", "bad_alloc", "out of memory")

_MOST_HEADER = 1 << 24
_MOST_READINGS = 8
"""Videos that wait at once where their reading has come to: a decoder of a large one holds hundreds of MiB."""

Reply = tuple[dict[str, Any], list[bytes]]


class ClosedError(Exception):
    """The connection is closed, or the data received are no message."""


def send(link: Connection, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write a message.

    Raises:
        ClosedError: the other side is gone.
    """
    try:
        link.send_bytes(json.dumps({**message, "blobs": len(blobs)}).encode())
        for blob in blobs:
            link.send_bytes(blob)
    except OSError:
        raise ClosedError from None


def receive(link: Connection) -> Reply:
    """Read a message.

    Raises:
        ClosedError: the other side is gone, or what came is no message.
    """
    try:
        message = json.loads(link.recv_bytes(_MOST_HEADER))
        return message, [link.recv_bytes() for _ in range(message.pop("blobs"))]
    except (EOFError, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ClosedError from None


def main(descriptor: int, memory: int) -> None:
    """Serve requests until the connection is closed.

    Args:
        descriptor: of the connection.
        memory: MiB of data that may be allocated over what the process needs by itself.
    """
    link = Connection(descriptor)
    import av  # here, so that what the libraries need themselves does not count

    av.logging.set_level(av.logging.PANIC)
    _limit(memory)
    threading.Thread(target=_leave_with, args=(descriptor,), daemon=True).start()
    with contextlib.suppress(ClosedError):
        _serve(link)


def _serve(link: Connection) -> None:
    send(link, {"ready": True})
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # decoders write about every damaged frame
    videos: dict[int, VideoFile] = {}
    while True:
        request, blobs = receive(link)
        # default action, by the kernel: it also ends a decoder that never gives Python its turn
        signal.setitimer(signal.ITIMER_REAL, float(request["seconds"]) + _GRACE)
        send(link, *_answer(videos, request, blobs))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(videos: dict[int, VideoFile], request: dict[str, Any], blobs: list[bytes]) -> Reply:
    try:
        return {"open": _open, "plan": _plan, "frames": _frames, "close": _close}[request["do"]](videos, request, blobs)
    except ConfigError as error:
        return {"config": str(error)}, []
    except MemoryError:
        return {"memory": True}, []
    except DataError as error:
        if any(words in str(error).lower() for words in _NO_MEMORY):
            return {"memory": True}, []
        return {"rejected": str(error)}, []
    except Exception as error:  # a damaged clip may bring a decoder to raise anything
        if any(words in str(error).lower() for words in _NO_MEMORY):
            return {"memory": True}, []
        name = request.get("name", "the video")
        return {"rejected": str(reject("video_broken", f"{name}: {type(error).__name__}: {error}"[:500]))}, []


def _open(videos: dict[int, VideoFile], request: dict[str, Any], blobs: list[bytes]) -> Reply:
    held, name, frames = iter(blobs), request["name"], request["frames"]

    def medium(place: dict[str, Any]) -> MediaFile:
        data = next(held, None) if place["path"] is None else None
        return MediaFile(path=place["path"], data=data, offset=place["offset"], size=place["size"], label=name)

    file = MediaFile(label=name, frames=tuple(map(medium, frames))) if frames else medium(request)
    file = dataclasses.replace(file, frame_rate=request["frame_rate"], start=request["start"], end=request["end"])
    video = open_here(file, request["backend"])
    videos[request["video"]] = video
    return {"fps": video.fps}, [np.asarray(video.times, dtype="<f8").tobytes()]


def _plan(videos: dict[int, VideoFile], request: dict[str, Any], blobs: list[bytes]) -> Reply:
    video = videos[request["video"]]
    numbers = video.plan(PreprocessSpec.from_dict(request["spec"]), request["max_frames"])
    return {"fps": video.fps, "numbers": numbers}, [np.asarray(video.times, dtype="<f8").tobytes()]


def _frames(videos: dict[int, VideoFile], request: dict[str, Any], blobs: list[bytes]) -> Reply:
    spec, video = PreprocessSpec.from_dict(request["spec"]), videos.pop(request["video"])
    videos[request["video"]] = video  # the latest comes last
    for waiting in list(videos.values())[:-_MOST_READINGS]:
        waiting.close()
    numbers = request["numbers"]
    items = video.frames(spec, request["max_frames"]) if numbers is None else video.frames_at(spec, numbers)
    sizes = [[item.width, item.height, item.time] for item in items]
    return {"items": sizes}, [item.data for item in items]


def _close(videos: dict[int, VideoFile], request: dict[str, Any], blobs: list[bytes]) -> Reply:
    video = videos.pop(request["video"], None)
    if video is not None:
        video.close()
    return {}, []


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", "rb") as stream:
            used = int(stream.read().split()[5]) * resource.getpagesize()  # data and stack
        most = used + (memory << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (OSError, ValueError):  # no Linux: there the other process alone watches
        pass


def _leave_with(descriptor: int) -> None:
    """End this process when the other end of the connection is closed, whatever a decoder is doing."""
    watch = select.poll()
    watch.register(descriptor, 0)  # hang-ups and errors are always reported
    while not watch.poll():
        pass
    os._exit(0)
