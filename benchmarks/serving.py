"""The server under load: equal answers, requests a second, time to the first token, cancellation, time to start.

    python benchmarks/serving.py --model runs/quickstart/hf

Starts tools/serve.py on a free port of this machine and asks it, from this process:

equal       64 clients at once, mixed lengths and media, greedy and seeded: the same answers as one client alone gets.
throughput  requests a second of 32 clients, over those of one client; the same mixture, answers of 16 to 128 tokens.
first token seconds to it, streamed, for one client and for 32: median and 95th percentile.
cancel      from the client's disconnecting to an empty cache, while decoding and while the prompt is being computed.
start       from the process's start to readiness, less the time of loading.
memory      most that a request of 4,096 frames takes beside its body; another server, of 131,072 positions.

Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from figure import Figure
from serving_kit import CHAT, Server, chat, image_part, mixed, percentile, picture, server

CLIENTS = 32
_TIMEOUT = httpx.Timeout(600.0)


def ask(client: httpx.Client, body: dict[str, Any]) -> Any:
    """The choices and the token counts of an answer."""
    response = client.post(CHAT, json=body)
    if response.status_code != 200:
        raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")
    answer = response.json()
    return answer["choices"], answer["usage"]


def at_once(here: Server, clients: int, bodies: Sequence[dict[str, Any]], one: Callable[..., Any] = ask) -> list[Any]:
    """What as many clients get for the bodies, each with a connection of its own."""
    kept = threading.local()
    opened: list[httpx.Client] = []

    def work(body: dict[str, Any]) -> Any:
        if not hasattr(kept, "client"):
            kept.client = httpx.Client(base_url=here.url, timeout=_TIMEOUT, trust_env=False)
            opened.append(kept.client)
        return one(kept.client, body)

    with ThreadPoolExecutor(clients) as pool:
        try:
            return list(pool.map(work, bodies))
        finally:
            for client in opened:
                client.close()


def first_token(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first piece of its answer."""
    begun = time.monotonic()
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        response.raise_for_status()
        seconds = None
        for line in response.iter_lines():
            if seconds is None and line.startswith("data: {") and _has_content(_chunk(line)):
                seconds = time.monotonic() - begun
    return time.monotonic() - begun if seconds is None else seconds


def _chunk(line: str) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return chunk


def _has_content(chunk: dict[str, Any]) -> bool:
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"]))
    return any(choice["delta"].get("content") or choice["finish_reason"] for choice in chunk["choices"])


def equal(here: Server, count: int) -> Iterator[Figure]:
    """Answers of many clients at once against those of one."""
    bodies = mixed(count, seed=1)
    serial = at_once(here, 1, bodies)
    together = at_once(here, count, bodies)
    same = sum(json.dumps(a) == json.dumps(b) for a, b in zip(serial, together, strict=True))
    yield Figure(f"answers of {count} clients equal to serial ones", f"{same} of {count}", "all", same == count)


def throughput(here: Server, rounds: int) -> Iterator[Figure]:
    """Requests a second, of one client and of many."""
    rates = []
    tokens = (16, 128)  # as answers of chats are; those of a few are mostly prompts, which one step computes anyway
    alone, many = mixed(CLIENTS, seed=2, tokens=tokens), mixed(CLIENTS * rounds, seed=3, tokens=tokens)
    for clients, bodies in ((1, alone), (CLIENTS, many)):
        begun, worked = time.monotonic(), here.processor_seconds()
        at_once(here, clients, bodies)
        seconds, worked = time.monotonic() - begun, here.processor_seconds() - worked
        rates.append(len(bodies) / seconds)
        measured = f"{rates[-1]:.2f}, {worked / len(bodies) * 1e3:.0f} ms of processors each"
        yield Figure(f"requests a second, {clients} client{'s' * (clients > 1)}", measured)
    ratio = rates[1] / rates[0]
    yield Figure(f"requests a second, {CLIENTS} clients over one", f"{ratio:.1f} times", "3 times", ratio >= 3)


def first_tokens(here: Server, rounds: int) -> Iterator[Figure]:
    """Time to the first token, alone and under load."""
    for clients, bodies in ((1, mixed(CLIENTS, seed=4)), (CLIENTS, mixed(CLIENTS * rounds, seed=5))):
        seconds = at_once(here, clients, bodies, first_token)
        figures = f"median {percentile(seconds, 0.5):.3f} s, 95 % {percentile(seconds, 0.95):.3f} s"
        yield Figure(f"first token, {clients} client{'s' * (clients > 1)}", figures)


def cancel(here: Server, times: int) -> Iterator[Figure]:
    """From a disconnect to an empty cache."""
    with httpx.Client(base_url=here.url, timeout=_TIMEOUT, trust_env=False) as client:
        longest = client.get("/v1/models").json()["data"][0]["max_model_len"]
        for name, decodes in (("while decoding", True), ("before the first token", False)):
            seconds = []
            for number in range(times):
                words = "seven " * (8 if decodes else longest // 16)
                body = chat(f"{number} {words}", max_tokens=longest, ignore_eos=True, temperature=1, stream=True)
                seconds.append(_cancelled(here, client, body, decodes=decodes))
            worst = max(seconds)
            yield Figure(f"cache free after a disconnect {name}, worst of {times}", f"{worst:.3f} s", "1 s", worst <= 1)


def _cancelled(here: Server, client: httpx.Client, body: dict[str, Any], *, decodes: bool) -> float:
    cache, jobs = "vita_kv_cache_usage_ratio", "vita_requests_running"
    with httpx.Client(base_url=here.url, timeout=_TIMEOUT, trust_env=False) as other:
        request = other.build_request("POST", CHAT, json=body)
        response = other.send(request, stream=True)
        response.raise_for_status()
        if decodes:
            lines = response.iter_lines()  # kept: a generator that is dropped closes the connection
            while not ((line := next(lines)).startswith("data: {") and _has_content(_chunk(line))):
                pass
        _until(lambda: here.metric(cache, client) > 0)
        response.close()
    begun = time.monotonic()
    _until(lambda: here.metric(cache, client) == 0 and here.metric(jobs, client) == 0)
    return time.monotonic() - begun


def _until(holds: Callable[[], bool]) -> None:
    """Ask again and again, for a minute at most."""
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError("it does not come about within a minute")
        time.sleep(0.005)


def memory(here: Server, frames: int) -> Iterator[Figure]:
    """Peak of the server's processes while it answers about thousands of frames, each a picture of its own."""
    pictures = [image_part(picture((448, 448), seed, "JPEG"), "image/jpeg", max_dynamic_patch=1) for seed in range(16)]
    body = json.dumps(chat("Which digit is marked?", *(pictures[n % 16] for n in range(frames)), max_tokens=4)).encode()
    done = threading.Event()
    peaks = [before := here.holds().rss]

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(here.holds().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with httpx.Client(base_url=here.url, timeout=_TIMEOUT, trust_env=False) as client:
            response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    finally:
        done.set()
        watching.join()
    if response.status_code != 200:
        raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")
    beside = (max(peaks) - before - len(body)) / 2**20
    name = f"peak of a request of {frames} frames, beside its body of {len(body) >> 20} MiB"
    yield Figure(name, f"{beside:.0f} MiB", "2048 MiB", beside < 2048)


def start(here: Server) -> Iterator[Figure]:
    """How long it took to be ready."""
    loading = here.loading()
    rest = here.seconds - loading
    yield Figure("start to ready", f"{here.seconds:.2f} s, {loading:.2f} s of it loading", "10 s beside it", rest <= 10)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder that tools/serve.py takes")
    parser.add_argument("--quick", action="store_true", help="few requests: whether it runs, not how fast")
    args = parser.parse_args(argv)
    count, rounds, times = (8, 1, 1) if args.quick else (64, 4, 10)
    missed = 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        here = stack.enter_context(server(args.model, Path(scratch) / "serve.log"))
        at_once(here, 4, mixed(8, seed=0))  # what is done once in a process is not measured
        sections = (
            ("start", start(here)),
            ("equal", equal(here, count)),
            ("throughput", throughput(here, rounds)),
            ("first token", first_tokens(here, rounds)),
            ("cancel", cancel(here, times)),
        )
        for name, figures in sections:
            print(f"-- {name}", flush=True)
            for figure in figures:
                print(figure.line(), flush=True)
                missed += figure.kept is False
        frames = 64 if args.quick else 4096
        long = ("--max-position-embeddings", str(32 * frames), "--kv-cache-memory", "1GiB")
        other = stack.enter_context(server(args.model, Path(scratch) / "long.log", long))
        print("-- memory", flush=True)
        for figure in memory(other, frames):
            print(figure.line(), flush=True)
            missed += figure.kept is False
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
