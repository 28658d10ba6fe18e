"""Shared by serving.py and serving_hostile.py: a server process, bodies of requests, and what a process holds."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
_START = 300.0
"""Seconds that a server may take to be ready."""


@dataclass(slots=True)
class Server:
    """A server process that is ready."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    seconds: float
    """From its start to readiness."""

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.url.rsplit(":", 1)[1])

    def metric(self, name: str, client: httpx.Client) -> float:
        """The value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", client.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found is not None, f"there is no metric {name}"
        return float(found[1])

    def loading(self) -> float:
        """Seconds in which it loaded the model, as its log says."""
        found = re.search(r"is loaded in ([0-9.]+) s", self.log.read_text(encoding="utf-8"))
        assert found is not None, "the log does not say how long loading took"
        return float(found[1])

    def processor_seconds(self) -> float:
        """Seconds of processors that it has taken so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def holds(self) -> Holding:
        """What the process and its children hold now."""
        here = psutil.Process(self.process.pid)
        rss, children = here.memory_info().rss, here.children(recursive=True)
        for one in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                rss += one.memory_info().rss
        return Holding(rss, here.num_fds(), here.num_threads(), 1 + len(children))


@dataclass(frozen=True, slots=True)
class Holding:
    """Resident bytes of all processes, open files and threads of the first, and how many there are."""

    rss: int
    descriptors: int
    threads: int
    processes: int
    """Each thread that reads videos has one to decode them, once it has met one."""


@contextlib.contextmanager
def server(model: str, log: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    """Start tools/serve.py on a free port; once it is ready, give it; at the end, SIGTERM.

    Args:
        model: folder.
        log: file that its output goes to.
        flags: more of its flags.

    Raises:
        RuntimeError: it has ended, or is not ready in time; the message ends with its log.
    """
    command = [sys.executable, str(ROOT / "tools/serve.py"), "--model", model, "--port", "0", *flags]
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    begun = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        url = _ready(process, log, begun)
        yield Server(process, url, log, time.monotonic() - begun)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path, begun: float) -> str:
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() - begun < _START and process.poll() is None:
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text(encoding="utf-8"))
            if found is not None:
                with contextlib.suppress(httpx.TransportError):  # it is bound, and not listening yet
                    if client.get(f"{found[1]}/ready").status_code == 200:
                        return found[1]
            time.sleep(0.02)
    raise RuntimeError(f"the server is not ready; status {process.poll()}. Its log:\n{log.read_text(encoding='utf-8')}")


def picture(side: tuple[int, int], seed: int, kind: str = "PNG") -> bytes:
    """A picture file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side[1], side[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def video(frames: int, seed: int, side: int = 32) -> bytes:
    """An MP4 file of random frames, one a second."""
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "x264-params": "threads=1"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, size=(side, side, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def data_url(content: bytes, media_type: str) -> str:
    """The content as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def chat(text: str, *media: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A body: one user's turn of media and a text, greedy unless `fields` say otherwise."""
    content = [*media, {"type": "text", "text": text}]
    return {"model": "any", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def image_part(content: bytes, media_type: str = "image/png", **extra: Any) -> dict[str, Any]:
    """A picture within a turn."""
    return {"type": "image_url", "image_url": {"url": data_url(content, media_type), **extra}}


def video_part(content: bytes) -> dict[str, Any]:
    """A video within a turn."""
    return {"type": "video_url", "video_url": {"url": data_url(content, "video/mp4")}}


def mixed(count: int, seed: int, *, tokens: tuple[int, int] = (4, 48)) -> list[dict[str, Any]]:
    """Bodies that differ: short and long texts, pictures, many pictures, videos; every second one drawn with a seed.

    Answers do not end before their `max_tokens`, so that their lengths are what `tokens` says.
    """
    rng = random.Random(seed)
    bodies = []
    for number in range(count):
        words = " ".join(
            rng.choice(("red", "seven", "box", "holds", "frame", "digit")) for _ in range(rng.randint(1, 150))
        )
        text = f"{words} {number}. Which digit is this?"
        media: list[dict[str, Any]] = []
        kind = number % 4
        if kind == 1:
            media = [image_part(picture((rng.randint(8, 64), rng.randint(8, 64)), seed + number))]
        elif kind == 2:
            media = [image_part(picture((16, 16), seed + number + one)) for one in range(rng.randint(2, 12))]
        elif kind == 3:
            media = [video_part(video(rng.randint(1, 16), seed + number))]
        drawn = {"temperature": 0.8, "top_p": 0.95, "seed": number} if number % 2 else {}
        bodies.append(chat(text, *media, max_tokens=rng.randint(*tokens), ignore_eos=True, **drawn))
    return bodies


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]
