"""Ten thousand hostile requests, and whether the server is as it was before.

    python benchmarks/serving_hostile.py --model runs/quickstart/hf [--count 10000] [--seed N]

Starts tools/serve.py on a free port of this machine and attacks it in batches: broken JSON, wrong types, deep nesting,
huge numbers, bad base64, bombs, truncated media, addresses of this machine, slow senders, disconnects at every stage,
garbage that is no HTTP, wrong routes (`hostile.py`), several at once. After each batch good requests must get the
answers that they got at first. Prints a table of the answers by kind, and what the process holds before and after. All
connections go to 127.0.0.1; count, bytes and time of each are bounded.

Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import hostile
import httpx
from figure import Figure
from serving_kit import CHAT, Holding, Server, chat, image_part, picture, server, video, video_part

AT_ONCE = 12
BATCH = 250
FLAGS = ("--header-timeout", "2", "--kv-cache-memory", "24MiB")
"""Of the server: slow senders are given up soon, so that ten thousand requests take minutes; and a cache that is
touched from end to end soon, because its pages come to be resident when they are first written."""
_PATIENCE = 120.0
"""Seconds that a client waits for an answer."""
_PROCESSES = 4
"""At most: the server, and one that decodes videos for each of its threads that read them: two readers, the engine."""
_SILENCE = 1.0
"""Seconds without more of an answer after which a client goes."""
_MOST_BYTES = 4 << 20
"""That a client reads of an answer."""


@dataclass(slots=True)
class Report:
    """What came of the attacks."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Kind of attack -> how it ended: an HTTP status, or what became of the connection."""
    longest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Kind of attack -> seconds of the one that took longest."""
    good: int = 0
    batches: int = 0
    leaked: int = 0
    """Answers that hold a file of this machine."""
    called: int = 0
    """Connections that the server made to the canary."""

    @property
    def attacks(self) -> int:
        """How many there were."""
        return sum(sum(one.values()) for one in self.answers.values())

    @property
    def failures(self) -> int:
        """Answers that blame the server, and attacks that it left without an end."""
        ends = (end for one in self.answers.values() for end in one.elements())
        return sum(end.startswith("5") or end == "no end" for end in ends)

    def table(self) -> Iterator[str]:
        """Kinds by their ends."""
        ends = sorted(
            {end for one in self.answers.values() for end in one}, key=lambda end: (not end[0].isdigit(), end)
        )
        yield f"| kind | {' | '.join(ends)} | longest |"
        yield f"| --- |{' ---: |' * (len(ends) + 1)}"
        for kind, one in sorted(self.answers.items()):
            yield f"| {kind} | {' | '.join(str(one[end] or '') for end in ends)} | {self.longest[kind]:.1f} s |"


async def carry_out(port: int, attack: hostile.Attack) -> tuple[str, bytes]:
    """Do what an attack says on a connection of its own; how it ended, and what was read."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "no connection", b""
    read = b""
    try:
        with anyio.fail_after(_PATIENCE):
            for number, piece in enumerate(attack.sends):
                if number:
                    await asyncio.sleep(attack.pause)
                writer.write(piece)
                await writer.drain()
            left = _MOST_BYTES if attack.reads is None else attack.reads
            while left > 0:
                part = b""
                with anyio.move_on_after(_SILENCE if read else _PATIENCE):  # the server may keep the connection
                    part = await reader.read(min(left, 1 << 16))
                if not part:
                    break
                read += part
                left -= len(part)
    except TimeoutError:
        return "no end", read
    except (ConnectionError, BrokenPipeError):
        pass  # the server had enough; what it said before is read
    finally:
        writer.transport.abort()
    if attack.reads == 0:
        return "went away", read
    read = read.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    status = read[9:12].decode("latin-1") if read.startswith(b"HTTP/1.1 ") else ""
    return status or "closed", read


async def batch(port: int, attacks: Sequence[tuple[str, hostile.Attack]], report: Report) -> None:
    """Carry out several at once."""
    left = iter(attacks)

    async def work() -> None:
        for kind, attack in left:
            begun = time.monotonic()
            end, read = await carry_out(port, attack)
            report.longest[kind] = max(report.longest[kind], time.monotonic() - begun)
            report.answers[kind][end] += 1
            report.leaked += b"root:x:" in read

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def good_answers(client: httpx.Client) -> str:
    """A text, a picture and a video are answered; the answers, which are the same every time."""
    media = (), (image_part(picture((16, 16), 5)),), (video_part(video(3, 5)),)
    choices = []
    for one in media:
        response = client.post(CHAT, json=chat("Which digit is this?", *one, max_tokens=8, ignore_eos=True))
        response.raise_for_status()
        choices.append(response.json()["choices"])
    return json.dumps(choices)


def attack_server(
    port: int, count: int, seed: int, *, kinds: Sequence[str] = tuple(hostile.KINDS), key: str = "none"
) -> Report:
    """Attack a server in batches, each followed by good requests.

    Args:
        port: on 127.0.0.1.
        count: attacks, the kinds in turn.
        seed: of all attacks.
        kinds: of attacks.
        key: the server's API key, which the attackers have too.

    Raises:
        httpx.HTTPError: a good request is not answered.
    """
    rng, report = random.Random(seed), Report()

    async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        report.called += 1
        writer.close()

    async def work() -> None:
        canary = await asyncio.start_server(called, "127.0.0.1", 0)
        hostile.canary = f"127.0.0.1:{canary.sockets[0].getsockname()[1]}"
        hostile.key = key
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=_PATIENCE, trust_env=False
        ) as client:
            expected = await asyncio.to_thread(good_answers, client)
            for start in range(0, count, BATCH):
                names = [kinds[number % len(kinds)] for number in range(start, min(start + BATCH, count))]
                await batch(port, [(name, hostile.KINDS[name](rng)) for name in names], report)
                report.good += await asyncio.to_thread(good_answers, client) == expected
                report.batches += 1
        canary.close()

    asyncio.run(work())
    return report


def settled(here: Server, client: httpx.Client) -> Holding:
    """What the server holds once it has nothing to do and no connection is open but ours."""
    held = here.holds()
    for _ in range(40):
        time.sleep(0.25)
        before, held = held, here.holds()
        if here.metric("vita_requests_running", client) == 0 and held.descriptors == before.descriptors:
            break
    return held


def figures(here: Server, client: httpx.Client, report: Report, before: Holding, after: Holding) -> Iterator[Figure]:
    """What must be as it was."""
    yield Figure("good requests answered alike after each batch", f"{report.good} of {report.batches}", "all",
                 report.good == report.batches)  # fmt: skip
    yield Figure("answers 5xx, and attacks without an end", str(report.failures), "0", report.failures == 0)
    yield Figure("files read and addresses called for a client", str(report.leaked + report.called), "0",
                 report.leaked + report.called == 0)  # fmt: skip
    state, age = client.get("/ready").json()["state"], here.metric("vita_engine_step_age_seconds", client)
    alive = here.process.poll() is None and state == "ready" and age < 5
    yield Figure("engine", f"{state}, stepped {age:.1f} s ago", "alive", alive)
    cache, bodies = (here.metric(name, client) for name in ("vita_kv_cache_usage_ratio", "vita_pending_body_bytes"))
    yield Figure("cache in use, bytes of bodies held", f"{cache:.3f}, {bodies:.0f}", "0", cache == bodies == 0)
    ratio = after.rss / before.rss
    yield Figure("resident memory", f"{before.rss >> 20} to {after.rss >> 20} MiB ({ratio - 1:+.1%})", "5 % more",
                 ratio <= 1.05)  # fmt: skip
    started = after.processes - before.processes  # each has a link
    for name, was, now, more in (
        ("open files", before.descriptors, after.descriptors, 2 + started),
        ("threads", before.threads, after.threads, 2),
    ):
        yield Figure(name, f"{was} to {now}", f"{more} more", now <= was + more)
    yield Figure("processes", str(after.processes), str(_PROCESSES), after.processes <= _PROCESSES)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder that tools/serve.py takes")
    parser.add_argument("--count", type=int, default=10_000, help="attacks, after a tenth as many to warm up")
    parser.add_argument("--seed", type=int, default=1, help="of the attacks")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        here = stack.enter_context(server(args.model, args.log or Path(scratch) / "serve.log", FLAGS))
        client = stack.enter_context(httpx.Client(base_url=here.url, timeout=_PATIENCE, trust_env=False))
        started = here.holds()
        attack_server(here.port, args.count // 10, args.seed + 1)  # what a process allocates once and keeps
        before, begun = settled(here, client), time.monotonic()
        report = attack_server(here.port, args.count, args.seed)
        seconds = time.monotonic() - begun
        after = settled(here, client)
        print("\n".join(report.table()))
        print(f"{report.attacks} attacks in {seconds:.0f} s; {started.rss >> 20} MiB before the first request")
        judged = list(figures(here, client, report, before, after))
    for figure in judged:
        print(figure.line())
    return int(any(figure.kept is False for figure in judged))


if __name__ == "__main__":
    sys.exit(main())
