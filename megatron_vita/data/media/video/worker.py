"""Decodes videos in a child process: a clip that hangs, crashes the decoder or exhausts memory is rejected alone.

One child serves a thread, clip after clip, so its start is paid once, and a clip that takes long holds up no other
thread. It is ended when a limit is hit, after which the next clip gets a new one, and it ends itself when this process
or thread is gone, however that came about.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, NoReturn

import psutil

from megatron_vita.data.media.video.child import ClosedError, Reply, receive, send
from megatron_vita.data.rejects import reject
from megatron_vita.errors import ConfigError, DataError

_LOOK = 0.05
"""Seconds between two looks at the child's memory."""
_START = 120.0
"""Seconds that starting the child may take on a loaded machine."""
_children = itertools.count(1)
_BOOT = (
    "import sys; arguments = sys.argv[1:]; sys.path[:] = arguments[2:]; "
    "from megatron_vita.data.media.video.child import main; main(int(arguments[0]), int(arguments[1]))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLimits:
    """Time and memory limits of decoding one video."""

    timeout: float = 600.0
    """Seconds, by the clock, from opening the clip to its last frame."""
    memory: int = 4096
    """MiB that the decoding process may hold over what it needs by itself."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"--video-timeout {self.timeout}: seconds, more than 0.")
        if self.memory < 64:
            raise ConfigError(f"--video-memory {self.memory}: MiB, at least 64; a frame alone takes some.")


class _Child:
    """The child process and the link to it."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.link, child_end = Pipe()
        path = [entry or os.getcwd() for entry in sys.path]
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(child_end.fileno()), str(memory), *path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(child_end.fileno(),),
                env={**os.environ, **single},
            )
        self._usage = psutil.Process(self._process.pid)
        deadline = time.monotonic() + _START

        def late() -> None:
            if time.monotonic() > deadline:
                raise ClosedError

        try:
            self.hear(late)
            self._resting = self._resident()
        except (ClosedError, psutil.Error):
            self.end()
            raise ConfigError(
                f"the process that decodes videos does not start (exit status {self._process.returncode}); what it "
                "said stands above. Is --video-memory large enough, and is av installed?"
            ) from None

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    def hear(self, look: Callable[[], None]) -> Reply:
        """Its next message; meanwhile `look` is called again and again, and may raise to give up.

        Raises:
            ClosedError: it is gone.
        """
        try:
            while not self.link.poll(_LOOK):
                look()
        except OSError:
            raise ClosedError from None
        return receive(self.link)

    def used(self) -> int:
        """Resident bytes over what the child needs by itself."""
        return self._resident() - self._resting

    def end(self) -> int:
        """Kill it and return its exit status."""
        self.link.close()
        self._process.kill()
        return self._process.wait()

    def last_words(self) -> int:
        """Exit status of a child that has closed the connection."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return self.end()

    def _resident(self) -> int:
        return int(self._usage.memory_info().rss)


class _Decoder(threading.local):
    """The child of the thread that uses it, started when it is first needed and again after it was lost."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self.started = 0
        """Number of the child, among those of all threads; a video opened in another one must be opened again."""

    def ask(
        self, name: str, limits: VideoLimits, seconds: float, message: dict[str, Any], blobs: Sequence[bytes] = ()
    ) -> Reply:
        """Send a request and wait for the answer, no longer than `seconds`.

        Raises:
            DataError: video_timeout, video_memory, media_crash, or what the child rejected.
        """
        child = self.child(limits)
        deadline, peak = time.monotonic() + seconds, 0

        def look() -> None:
            nonlocal peak
            try:
                peak = max(peak, child.used())
            except psutil.Error:
                return  # it is gone: the link will say so
            if peak > limits.memory << 20:
                self._lose(name, limits, "video_memory")
            if time.monotonic() > deadline:
                self._lose(name, limits, "video_timeout")

        try:
            send(child.link, {**message, "name": name, "seconds": seconds}, blobs)
            answer, parts = child.hear(look)
        except ClosedError:
            status = child.last_words()
            if status == -signal.SIGALRM:
                self._lose(name, limits, "video_timeout")
            if peak > 0.8 * (limits.memory << 20):
                self._lose(name, limits, "video_memory")
            self._lose(name, limits, "media_crash", status)
        if "config" in answer:
            raise ConfigError(answer["config"])
        if "memory" in answer:
            self._lose(name, limits, "video_memory")
        if "rejected" in answer:
            raise DataError(answer["rejected"])
        return answer, parts

    def child(self, limits: VideoLimits) -> _Child:
        """The child, started if there is none with this limit of memory."""
        if self._child is not None and self._child.memory != limits.memory:
            self.stop()
        if self._child is None:
            self._child = _Child(limits.memory)
            self.started = next(_children)
        return self._child

    def tidy(self, limits: VideoLimits) -> None:
        """Between two clips: a child whose decoder has kept much memory is replaced, so that each clip has its own."""
        try:
            if self._child is not None and self._child.used() > (limits.memory << 20) // 4:
                self.stop()
        except psutil.Error:
            self.stop()

    def stop(self) -> None:
        """End the child; the next clip gets a new one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def forget(self) -> None:
        """In a forked copy of the process: the child is the parent's."""
        if self._child is not None:
            self._child.link.close()
        self._child = None

    def _lose(self, name: str, limits: VideoLimits, code: str, status: int = 0) -> NoReturn:
        self.stop()
        if code == "video_timeout":
            message = f"not decoded in {limits.timeout:g} seconds. Raise --video-timeout or drop the sample."
        elif code == "video_memory":
            message = f"decoding takes more than {limits.memory} MiB. Raise --video-memory or drop the sample."
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            message = f"decoding it killed its process ({how}). Replace the file or drop the sample."
        raise reject(code, f"{name}: {message}")


decoder = _Decoder()
"""The decoder of each thread."""
atexit.register(decoder.stop)
os.register_at_fork(after_in_child=decoder.forget)
