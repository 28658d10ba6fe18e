"""Fixtures: the forms that users bring of their own."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.fixtures_kit import (
    Good,
    Pairs,
    Promise,
    array,
    clip,
    dot,
    jpg,
    lines,
    messages,
    put,
    put_tar,
    put_zip,
    qa,
    turns,
)


def long_vita(root: Path) -> Iterator[Promise]:
    """G1: an array or lines, `messages` or the older key, pictures and videos in any order, bare lists."""
    for n in range(3):
        put(root / f"images/{n}.png", dot(n))
    put(root / "v.mp4", clip(5))
    mixed = Good([("user", "x[v0]y[i0][i1]"), ("assistant", "a")], [dot(1), dot(2)], [clip(5)])
    pairs: Pairs = [
        ({"messages": messages("<image>q", "an <image>"), "images": ["images/0.png"]},
         qa("[i0]q", "an <image>", images=[dot(0)])),
        ({"messages": messages("x<video>y<image><image>", "a"), "images": ["images/1.png", "images/2.png"],
          "videos": ["v.mp4"]}, mixed),
        ({"messages": messages("q", "a"), "images": [], "videos": None}, qa()),
        ({"conversations": messages("q", "a"), "messages": []}, qa()),
        ({"messages": messages("<image>q", "a"), "images": [None]}, "media_missing"),
        ({"messages": messages("<image><image>", "a"), "images": ["images/1.png"]}, "media_count"),
        ({"messages": messages("<image>", "a"), "images": ["images/1.png"], "image": "images/2.png"}, "bad_record"),
    ]  # fmt: skip
    yield lines(root / "lines.jsonl", "long_vita", pairs, root)
    yield array(root / "array.json", "long_vita", pairs, root)
    yield lines(root / "bare.jsonl", "long_vita", [(messages("q", "a"), qa())] * 3)


def llava(root: Path) -> Iterator[Promise]:
    """G2, packed by gzip too."""
    put(root / "a.jpg", jpg(3))
    pairs: Pairs = [
        ({"id": 7, "image": "a.jpg", "conversations": turns("<image>\nq", "a")}, qa("[i0]\nq", images=[jpg(3)])),
        ({"id": "7", "image": ["a.jpg", "a.jpg"], "conversations": turns("<image><image>q", "a")},
         qa("[i0][i1]q", images=[jpg(3)] * 2)),
        ({"id": "8", "conversations": turns("q", "a")}, qa()),
        ({"id": "9", "image": "https://example.invalid/a", "conversations": turns("<image>q", "a")}, "media_remote"),
    ]  # fmt: skip
    yield array(root / "llava.json", "llava", pairs)


def openai(root: Path) -> Iterator[Promise]:
    """G3: parts in their order, pictures as addresses with their bytes, files, videos."""
    put(root / "b.png", dot(4))
    put(root / "v.mp4", clip(5))
    url = "data:image/png;base64," + base64.b64encode(dot(5)).decode()
    parts = [
        {"type": "text", "text": "Left <image>:"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": "b.png"},
        {"type": "image", "image": f"file://{root}/b.png"},
        {"type": "video", "video": "v.mp4"},
        {"type": "input_text", "text": "Name it."},
    ]
    shown = [("system", "s"), ("user", "Left <image>:[i0][i1][i2][v0]Name it."), ("assistant", "a")]
    answer = {"role": "assistant", "content": "a"}
    pairs: Pairs = [
        ({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, answer]},
         Good(shown, [dot(5), dot(4), dot(4)], [clip(5)])),
        ({"messages": [{"role": "user", "content": "q"}, answer]}, qa()),
        ({"messages": [{"role": "user", "content": "q"}, answer | {"tool_calls": [{}]}]}, "tools_unread"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}, answer]}, "media_unread"),
    ]  # fmt: skip
    yield lines(root / "openai.jsonl", "openai", pairs)


def texts(root: Path) -> Iterator[Promise]:
    """G4 ShareGPT, G5 Alpaca, G6 two fields, and plain text with questions beside."""
    talk = [{"from": "user", "value": "q"}, {"from": "bard", "value": "a"}]
    pairs: Pairs = [
        ({"items": talk}, qa()),
        ({"conversations": talk, "system": "s"}, Good([("system", "s"), ("user", "q"), ("assistant", "a")])),
        ({"conversations": [*talk, {"from": "tool", "value": "x"}]}, "bad_role"),
    ]
    yield lines(root / "sharegpt.jsonl", "sharegpt", pairs)
    history = Good([("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "q\n\nx"), ("assistant", "a")])
    pairs = [
        ({"instruction": "q", "input": "", "output": "a"}, qa()),
        ({"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["h", "g"]]}, history),
        ({"instruction": "q", "output": "a", "history": [["h"]]}, "bad_record"),
    ]
    yield array(root / "alpaca.json", "alpaca", pairs)
    yield lines(root / "pair.jsonl", "pair", [({"prompt": "q", "response": "a"}, qa()), ({"query": "q"}, "bad_record")])
    asked = {"context": "c", "questions": ["q"], "answers": ["a"]}
    yield lines(root / "context.jsonl", "long_context_qa", [(asked, qa("c\n\nq"))])


def webdataset(root: Path) -> Iterator[Promise]:
    """G7: a json part with turns, two pictures out of order; a caption."""
    talk = {"messages": messages("<image>then<image>", "a")}
    members = {
        "d/001.1.png": dot(2), "d/001.0.png": dot(1), "d/001.json": json.dumps(talk).encode(),
        "d/002.png": dot(3), "d/002.txt": b"A cup.",
        "d/003.png": dot(4), "d/003.json": json.dumps({"conversations": turns("no tag", "a")}).encode(),
    }  # fmt: skip
    wanted = (
        qa("[i0]then[i1]", images=[dot(1), dot(2)]),
        qa("[i0]\nPlease describe this image in detail.", "A cup.", images=[dot(3)]),
        "media_count",
    )
    yield Promise("webdataset", put_tar(root / "wds-000000.tar", members), wanted)


def parquet(root: Path) -> Iterator[Promise]:
    """G8: raw bytes in a column, a path in a struct, a column of paths."""
    put(root / "c.png", dot(6))
    talk = [turns("<image>q", "a")] * 2
    raw = pa.table({"image": pa.array([dot(7), None], pa.binary()), "conversations": [talk[0], turns("q", "a")]})
    outside = pa.table({"images": [[{"bytes": b"", "path": "c.png"}], ["none.png"]][:1] * 2, "conversations": talk})
    for name, table, wanted in (
        ("raw", raw, (qa("[i0]q", images=[dot(7)]), qa())),
        ("outside", outside, (qa("[i0]q", images=[dot(6)]),) * 2),
        ("paths", pa.table({"image": ["c.png", "none.png"], "conversations": talk}),
         (qa("[i0]q", images=[dot(6)]), "media_missing")),
    ):  # fmt: skip
        pq.write_table(table, root / f"{name}.parquet")
        yield Promise("llava", root / f"{name}.parquet", wanted)


def archives(root: Path) -> Iterator[Promise]:
    """G9: records in an archive, one a member or many."""
    record = {"conversations": turns("q", "a")}
    members = {
        "a/2.json": json.dumps(record).encode(),
        "a/10.json": b"{",
        "b.jsonl": (json.dumps(record) + "\n").encode() * 2,
    }
    yield Promise("sharegpt", put_zip(root / "records.zip", members), ("bad_json", qa(), qa(), qa()))
    yield Promise("sharegpt", put_tar(root / "records.tar.gz", members), ("bad_json", qa(), qa(), qa()))


GENERIC = (long_vita, llava, openai, texts, webdataset, parquet, archives)
