"""Requests of hostile clients, for serving_hostile.py: every kind is a function of a seeded generator of numbers.

An HTTP attack is bytes for one connection; a slow or fleeting one also says when the client pauses and when it goes.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serving_kit import CHAT, chat, image_part, picture, video, video_part

COMPLETIONS = "/v1/completions"
_SMALL = picture((8, 8), 1)
_VIDEO = video(4, 1)
_FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed",
    "stop", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "user", "tools",
    "frequency_penalty", "repetition_penalty", "response_format", "media_io_kwargs", "mm_processor_kwargs",
    "chat_template_kwargs", "stop_token_ids", "min_tokens", "ignore_eos", "prompt_logprobs", "tool_choice",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 1e-300, 1e308, 0.5, "", "seven", "\u0000", "\ud800",
    [], [[]], [None], [1, "a"], {}, {"": None}, {"type": "json_schema"}, {"a": {"b": {"c": []}}}, "x" * 10_000,
)  # fmt: skip
canary = "127.0.0.1:1"
"""Address that no server may ever call, whatever a client says."""
key = "none"
"""API key of the server: a hostile client may have one."""
_GONE = ("before the body", "in the body", "before the answer", "in the stream")


@dataclass(frozen=True, slots=True)
class Attack:
    """What a client does on one connection."""

    sends: tuple[bytes, ...]
    """Pieces; the client pauses after each but the last."""
    pause: float = 0.0
    """Seconds."""
    reads: int | None = None
    """Bytes of the answer after which it goes; 0: at once. None: it reads the whole answer."""


def request(body: bytes, *, path: str = CHAT, method: str = "POST", headers: Mapping[str, str] | None = None) -> bytes:
    """A whole HTTP request that asks the server to close the connection."""
    lines = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {"Connection": "close", "Authorization": f"Bearer {key}", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def json_bytes(value: Any) -> bytes:
    """JSON, with lone surrogates and infinities as Python writes them."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def broken_json(rng: random.Random) -> Attack:
    """A good body with bytes cut off, changed or inserted."""
    good = bytearray(json_bytes(chat("Which digit is this?", image_part(_SMALL), max_tokens=2)))
    kind = rng.randrange(4)
    if kind == 0:
        good = good[: rng.randrange(len(good))]
    elif kind == 1:
        for _ in range(rng.randint(1, 8)):
            good[rng.randrange(len(good))] = rng.randrange(256)
    elif kind == 2:
        place = rng.randrange(len(good))
        good[place:place] = rng.randbytes(rng.randint(1, 40))
    else:
        good = bytearray(
            rng.choice((b"", b"null", b"[]", b'"x"', b"{", b"NaN", b'{"a":Infinity}', b"\xff\xfe{}", b"[" * 99))
        )
    return Attack((request(bytes(good), path=rng.choice((CHAT, COMPLETIONS))),))


def wrong_types(rng: random.Random) -> Attack:
    """A field, at the top or in a message, with a value of any type."""
    body: dict[str, Any] = chat("seven", image_part(_SMALL), max_tokens=2)
    for _ in range(rng.randint(1, 3)):
        target: Any = body
        if rng.random() < 0.4 and isinstance(body["messages"], list) and body["messages"]:
            target = body["messages"][0]
            if isinstance(target, dict) and rng.random() < 0.6 and isinstance(target.get("content"), list):
                target = rng.choice(target["content"] or [body])
        names = list(target) if isinstance(target, dict) and target is not body else _FIELDS
        if isinstance(target, dict) and names:
            target[rng.choice(names)] = rng.choice(_VALUES)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is None or (isinstance(body[name], int) and body[name] > 100):
            body[name] = 2  # as long as the context would be right, and take long
    return Attack((request(json_bytes(body)),))


def completions(rng: random.Random) -> Attack:
    """Prompts of any type, too many, too long, of ids that there are not."""
    prompts: tuple[Any, ...] = (
        *_VALUES, ["a"] * 2000, [0] * 100_000, [-1], [10**9], [[1], ["a"]], [[]], ["", ""], [1.5], "seven " * 20_000,
    )  # fmt: skip
    body = {"prompt": rng.choice(prompts), "max_tokens": rng.choice((1, 0, -5, 2)), "n": rng.choice((1, 2, 1000))}
    return Attack((request(json_bytes(body), path=COMPLETIONS),))


def nesting(rng: random.Random) -> Attack:
    """Objects or arrays within each other, up to a million deep."""
    depth = rng.choice((65, 1000, 10_000, 100_000, 500_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"messages":', b"}]")))
    inner = opening * depth + b"1" + (closing * depth if rng.random() < 0.7 else b"")
    return Attack((request(b'{"messages":' + inner + b"}"),))


def huge_numbers(rng: random.Random) -> Attack:
    """Numbers of thousands of digits, exponents without end, and numbers beyond every range."""
    number = rng.choice(
        (
            "9" * 5000,
            "1e999999",
            "-1e400",
            "0." + "1" * 5000,
            "1" + "0" * 4300,
            "1e-999",
            "-0",
            "1E5",
            "12345678901234567890",
        )
    )
    name = rng.choice(
        ("max_tokens", "temperature", "seed", "n", "top_k", "logit_bias", "top_logprobs", "stop_token_ids")
    )
    value = {"logit_bias": f'{{"1":{number}}}', "stop_token_ids": f"[{number}]"}.get(name, number)
    body = f'{{"messages":[{{"role":"user","content":"seven"}}],"{name}":{value}'
    return Attack((request((body + ("" if name == "max_tokens" else ',"max_tokens":2') + "}").encode()),))


def bad_base64(rng: random.Random) -> Attack:
    """Data URLs of nothing, of wrong types and characters, with padding where none belongs."""
    good = base64.b64encode(_SMALL).decode()
    place = rng.randrange(len(good))
    url = rng.choice(
        (
            "data:", "data:,", "data:image/png;base64,", "data:image/png;base64", f"data:image/png,{good}",
            f"data:image/png;base64,{good[:place]}{rng.choice('*é= ')}{good[place:]}", f"data:text/html;base64,{good}",
            f"data:image/png;base64,{good[:place]}", f"data:video/mp4;base64,{good}",
            "data:image/png;base64," + "A" * 40_000,
            f"data:image/png;base64,{good}====", f"data:;;;;;base64,{good}", f"data:image/svg+xml;base64,{good}",
        )
    )  # fmt: skip
    kind = rng.choice(("image_url", "video_url"))
    return Attack((request(json_bytes(chat("seven", {"type": kind, kind: {"url": url}}, max_tokens=2))),))


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG file that says to be of a size, whatever its data are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


_ZEROS = zlib.compress(bytes(20_000_000), 9)
"""20 kB that become 20 MB."""


def bombs(rng: random.Random) -> Attack:
    """Pictures that say to be enormous, or become so: PNG, GIF, WebP, BMP; and very many of them."""
    kind = rng.randrange(6)
    if kind == 0:
        side = rng.choice((20_000, 65_535, 2**31 - 1))
        media = [image_part(png(side, side, _ZEROS))]
    elif kind == 1:
        media = [image_part(png(rng.choice((1, 60_000)), rng.choice((2_000_000, 1)), _ZEROS))]
    elif kind == 2:  # a GIF of a large screen and no picture
        media = [
            image_part(b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6) + b";", "image/gif")
        ]
    elif kind == 3:  # an extended WebP of the largest canvas, animated, with nothing in it
        frames = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\xff\xff" * 2
        media = [image_part(b"RIFF" + struct.pack("<I", len(frames) + 4) + b"WEBP" + frames, "image/webp")]
    elif kind == 4:
        header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        media = [image_part(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header, "image/bmp")]
    else:
        media = [image_part(_SMALL)] * rng.choice((300, 9000))
    return Attack((request(json_bytes(chat("seven", *media, max_tokens=2))),))


def truncated(rng: random.Random) -> Attack:
    """Pictures and videos that end early or have bytes changed."""
    content = bytearray(
        rng.choice((_VIDEO, picture((32, 24), 2), picture((32, 24), 3, "JPEG"), picture((32, 24), 4, "WEBP")))
    )
    media_type = "video/mp4" if content[4:8] == b"ftyp" else "image/png"
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.randint(1, 30)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    part = video_part(bytes(content)) if media_type == "video/mp4" else image_part(bytes(content))
    return Attack((request(json_bytes(chat("seven", part, max_tokens=2))),))


def addresses(rng: random.Random) -> Attack:
    """URLs of this machine, of its files and of others, as pictures and videos."""
    url = rng.choice(
        (
            f"http://{canary}/x", f"http://{canary.replace('127.0.0.1', 'localhost')}/",
            "http://169.254.169.254/latest/meta-data/", "http://[::1]:1/", "http://localhost:1/",
            "http://0x7f000001:1/", "https://2130706433/", "ftp://127.0.0.1/", "gopher://127.0.0.1:1/",
            "file:///etc/passwd",
            "file:///proc/self/mem", "file://localhost/etc/shadow", "file:///dev/zero", "/etc/passwd",
            "../../etc/passwd",
            "file:///..%2f..%2fetc/passwd", "file://[", "\\\\host\\share", "//127.0.0.1/x", "javascript:alert(1)",
            "a\u0000b",
        )
    )  # fmt: skip
    kind = rng.choice(("image_url", "video_url"))
    return Attack((request(json_bytes(chat("seven", {"type": kind, kind: {"url": url}}, max_tokens=2))),))


def slow(rng: random.Random) -> Attack:
    """A head or a body that comes piece by piece and never ends."""
    whole = request(json_bytes(chat("seven " * 50, max_tokens=2)))
    head = whole.index(b"\r\n\r\n") + 4
    start = rng.randrange(1, head) if rng.random() < 0.5 else rng.randrange(head, len(whole) - 40)
    return Attack((whole[:start], *(whole[start + i : start + i + 1] for i in range(40))), pause=0.1)


def fleeting(rng: random.Random) -> Attack:
    """The client goes before or in the body, before the answer, or in the stream."""
    stage = rng.choice(_GONE)
    media = rng.choice(((), (image_part(_SMALL),), (video_part(_VIDEO),)))
    body = chat(f"{rng.random()} seven", *media, max_tokens=400, ignore_eos=True, stream=rng.random() < 0.7)
    whole = request(json_bytes(body))
    head = whole.index(b"\r\n\r\n") + 4
    if stage == "before the body":
        return Attack((whole[:head],), reads=0)
    if stage == "in the body":
        return Attack((whole[: rng.randrange(head, len(whole))],), reads=0)
    if stage == "before the answer":
        return Attack((whole, b""), pause=rng.choice((0.0, 0.005, 0.05)), reads=0)
    return Attack((whole,), reads=rng.choice((1, 300, 2000)))


def no_http(rng: random.Random) -> Attack:
    """Garbage, smuggled and pipelined requests, giant heads, wrong lengths."""
    good = request(json_bytes(chat("seven", max_tokens=2)))
    piped = request(b"", method="GET", path="/health", headers={"Connection": "keep-alive"})
    return Attack(
        (
            rng.choice(
                (
                    rng.randbytes(rng.randint(1, 3000)), b"\r\n" * 500, b"GET / HTTP/9.9\r\n\r\n",
                    b"\x16\x03\x01" + bytes(200),
                    request(b"{}", headers={"X": "y" * 200_000}),
                    request(b"{}", headers={f"X{i}": "y" for i in range(5000)}),
                    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", request(b"{}", headers={"Content-Length": "-1"}),
                    request(b"{}", headers={"Content-Length": "99999999999999999999"}),
                    request(b"{}", headers={"Transfer-Encoding": "chunked"}), piped * 50 + good,
                    piped * 20 + rng.randbytes(300),
                    good + rng.randbytes(300), request(b"{}", headers={"Content-Length": "1" * 5000}),
                    request(b"ffffffffffffffff\r\n", headers={"Transfer-Encoding": "chunked", "Content-Length": "5"}),
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    request(b"", headers={"Upgrade": "websocket", "Connection": "Upgrade"}),
                )
            ),
        ),
    )  # fmt: skip


def wrong_routes(rng: random.Random) -> Attack:
    """Methods, paths, hosts and types that there are not."""
    path = rng.choice(
        (
            CHAT, COMPLETIONS, "/", "/v1/models", "/metrics", "/info", "/page/../../../../etc/passwd",
            "/..%2f..%2fetc/passwd",
            "/page/%2e%2e/%2e%2e/etc/passwd", "/v1/models/" + "x" * 3000, "/v1/models/..%2f..", "/%00",
            "/page//etc/passwd",
            "http://169.254.169.254/", "*", "/v1/chat/completions/../../ready", "/page/..\\..\\x",
        )
    )  # fmt: skip
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "BREW"))
    headers = rng.choice(
        (
            {}, {"Host": "evil.example"}, {"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"},
            {"Range": "bytes=0-"}, {"Origin": "http://evil.example"}, {"Authorization": "Basic " + "A" * 3000},
            {"Expect": "100-continue"},
        )
    )  # fmt: skip
    return Attack((request(b"{}" if method != "HEAD" else b"", path=path, method=method, headers=headers),))


KINDS: Mapping[str, Callable[[random.Random], Attack]] = {
    "broken JSON": broken_json, "wrong types": wrong_types, "completions": completions, "deep nesting": nesting,
    "huge numbers": huge_numbers, "bad base64": bad_base64, "bombs": bombs, "truncated media": truncated,
    "addresses": addresses, "slow senders": slow, "disconnects": fleeting, "no HTTP": no_http, "routes": wrong_routes,
}  # fmt: skip
"""Every kind of attack."""
