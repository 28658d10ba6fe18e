"""WebDataset: members are grouped by key wherever they stand, nothing is taught without its picture, and a group that
contradicts itself is rejected."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.sample import Sample
from megatron_vita.data.sources import load_table, open_reader, record_to_sample
from megatron_vita.data.sources.media_store.store import MediaRule, open_store
from megatron_vita.errors import DataError
from tests.data.fixtures_kit import clip, dot, jpg, messages
from tests.data.sources.test_datasets import shown

ROW = load_table()["webdataset"]
PROMPT = "Please describe this image in detail."
Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members, mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def outcomes(path: Path, work: Path | None = None) -> list[Any]:
    """What becomes of each group: a Good, or the message it is rejected with."""
    reader, store = open_reader(path, "wds", work), open_store(MediaRule())
    out: list[Any] = []
    for line, record in reader.read(reader.index()):
        try:
            if isinstance(record, DataError):
                raise record
            sample, _ = record_to_sample(record, ROW, store=store, source="s", line=line)
            assert isinstance(sample, Sample)
            sample.check()
            out.append(shown(sample))
        except DataError as error:
            out.append(str(error))
    return out


def outcome(tmp_path: Path, *members: tuple[str, bytes]) -> Any:
    (one,) = outcomes(write_tar(tmp_path / "one.tar", members))
    return one


def said(value: Any) -> bytes:
    return json.dumps(value).encode()


def talk(*texts: str) -> dict[str, Any]:
    return {"conversations": messages(*texts)}


def captions(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(count)
        for member in ((f"{n:03}.png", dot(n)), (f"{n:03}.txt", f"no. {n}".encode()), (f"{n:03}.json", said({"n": n})))
    ]


# -------------------------------------------------------------------------------------------------------- grouping


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 9), form=st.sampled_from(["ustar", "gnu", "pax"]))
def test_members_are_grouped_wherever_they_stand(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, form: str
) -> None:
    folder = tmp_path_factory.mktemp("apart")
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    members = captions(count)
    shuffled = random.Random(seed).sample(members, len(members))
    sorted_tar = outcomes(write_tar(folder / "sorted.tar", members))
    mixed = outcomes(write_tar(folder / "mixed.tar", shuffled, format=formats[form]))
    first = list(dict.fromkeys(name.partition(".")[0] for name, _ in shuffled))
    assert mixed == [sorted_tar[int(key)] for key in first]  # in the order in which keys first appear


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_names_as_the_field_reads_them(tmp_path: Path, mode: str) -> None:
    long = "deep/" * 40 + "name"
    members = [
        ("./v1.0/a.JPG", jpg(1)), ("v1.0/b.jpg", jpg(2)), ("v1.0/._a.jpg", b"x"), ("__MACOSX/v1.0/a.txt", b"x"),
        (".cache/a.txt", b"x"), ("__info__/a.txt", b"x"), ("v1.0/a.TXT", b"one"), ("v1.0/b.Txt", b"two"),
        ("v2.0/a.jpg", jpg(3)), ("v2.0/a.txt", b"three"), (f"{long}.txt", b"four"), (f"{long}.jpeg", jpg(4)),
        ("A.png", dot(5)), ("a.png", dot(6)), ("A.txt", b"five"), ("a.txt", b"six"), ("\u00fc.webp", dot(7)),
        ("\u00fc.txt", b"seven"),
    ]  # fmt: skip
    for work in (None, tmp_path / "work"):
        got = outcomes(write_tar(tmp_path / "names.tar", members, mode), work)
        assert not [one for one in got if isinstance(one, str)]
        assert [one.turns[-1][1] for one in got] == ["one", "two", "three", "four", "five", "six", "seven"]
        assert [one.images[0] for one in got] == [*map(jpg, (1, 2, 3, 4)), *map(dot, (5, 6, 7))]


def test_places_are_read_in_any_order_by_another_reader(tmp_path: Path) -> None:
    members = random.Random(1).sample(captions(20), 60)
    path, work = write_tar(tmp_path / "a.tar", members), tmp_path / "work"
    reader = open_reader(path, "wds", work)
    reader.prepare(progress=False)
    offsets = reader.index()[::-3]
    lines = [line for line, _ in open_reader(path, "wds", work).read(offsets)]
    assert lines == offsets[:, 0].tolist()
    everything = dict(reader.read(reader.index()))
    for line, record in open_reader(path, "wds", work).read(offsets):
        assert record == everything[line]
    assert outcomes(write_tar(tmp_path / "none.tar", [("README", b"x")])) != []  # nothing is unused in silence
    assert len(open_reader(write_tar(tmp_path / "dots.tar", [(".hidden", b"x")]), "wds").index()) == 0


# ------------------------------------------------------------------------------------------------- what is taught

META = {
    "caption": "a red field", "url": "https://example.invalid/a.jpg", "key": "000000000", "status": "success",
    "error_message": None, "width": 8, "height": 8, "original_width": 80, "original_height": 80, "exif": "{}",
    "sha256": "0", "similarity": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_img2datasets_own_tars(tmp_path: Path, suffix: str) -> None:
    one = outcome(tmp_path, (f"0.{suffix}", dot(1)), ("0.json", said(META)), ("0.txt", b"a red field"))
    assert one.turns == [("user", f"[i0]\n{PROMPT}"), ("assistant", "a red field")]
    assert one.images == [dot(1)]
    for json_caption, text in (
        ("a red field", None),
        (None, b"a red field"),
        ("", b"a red field"),
        ("a red field", b""),
    ):
        members = [(f"0.{suffix}", dot(1)), ("0.json", said({**META, "caption": json_caption}))]
        members += [("0.txt", text)] if text is not None else []
        assert outcome(tmp_path, *members) == one


def test_a_failed_download_says_why(tmp_path: Path) -> None:
    meta = {**META, "status": "failed_to_download", "error_message": "HTTP Error 404"}
    for members in ([("0.json", said(meta)), ("0.txt", b"a red field")], [("0.json", said(meta))]):
        one = outcome(tmp_path, *members)
        assert one.startswith("media_missing: 0: its download failed (failed_to_download: HTTP Error 404)")


QUESTION = talk("<image>\nq", "a")
TWO = talk("<image><image>q", "a")
EMBEDDED = said({**QUESTION, "image": "data:image/png;base64,iVBORw0KGgo="})
GOOD: list[tuple[list[tuple[str, bytes]], list[bytes]]] = [
    ([("k.jpg", jpg(1)), ("k.json", said(QUESTION)), ("k.txt", b"a")], [jpg(1)]),  # the caption is the answer
    ([("k.jpg", jpg(1)), ("k.json", said({**QUESTION, "image": "old/name.jpg"}))], [jpg(1)]),
    ([("k.jpg", jpg(1)), ("k.json", said({**QUESTION, "image": "k.jpg", "image_url": "http://x.invalid"}))], [jpg(1)]),
    ([("k.jpg", jpg(1)), ("k.cls", b"7"), ("k.id", b"x"), ("k.json", said(QUESTION))], [jpg(1)]),
    ([("k.1.jpg", jpg(1)), ("k.0.jpg", jpg(2)), ("k.json", said(TWO))], [jpg(2), jpg(1)]),
    ([("k.img10.jpg", jpg(1)), ("k.img9.jpg", jpg(2)), ("k.json", said(TWO))], [jpg(2), jpg(1)]),
    ([("k.0.JPG", jpg(1)), ("k.1.png", dot(2)), ("k.json", said(TWO))], [jpg(1), dot(2)]),
    ([("k.left.jpg", jpg(1)), ("k.right.jpg", jpg(2)),
      ("k.json", said({**TWO, "images": ["k.right.jpg", "k.left.jpg"]}))], [jpg(2), jpg(1)]),
    ([("k.left.jpg", jpg(1)), ("k.right.jpg", jpg(2)),
      ("k.json", said({**TWO, "name": ["right", "left"]}))], [jpg(2), jpg(1)]),
    ([("k.jpg", jpg(1)), ("k.json", said({"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, messages("", "a")[1]]}))],
     [jpg(1)]),
    ([("k.jpg", jpg(1)), ("k.json", said({"messages": [
        {"role": "user", "content": "q", "image": "old.jpg"}, messages("", "a")[1]]}))], [jpg(1)]),
    ([("k.json", EMBEDDED)], [b"\x89PNG\r\n\x1a\n"]),
]  # fmt: skip


@pytest.mark.parametrize(("members", "images"), GOOD)
def test_groups_that_are_read(tmp_path: Path, members: Members, images: list[bytes]) -> None:
    one = outcome(tmp_path, *members)
    assert not isinstance(one, str), one
    assert one.images == images
    assert one.turns[1] == ("assistant", "a")


def test_videos_and_conversations_without_media(tmp_path: Path) -> None:
    one = outcome(tmp_path, ("k.MP4", clip(1)), ("k.txt", b"a film"))
    assert (one.videos, one.turns[0][1][:4]) == ([clip(1)], "[v0]")
    one = outcome(tmp_path, ("k.json", said(talk("plain", "a"))))
    assert (one.turns, one.images) == ([("user", "plain"), ("assistant", "a")], [])


CONTRADICTIONS: list[tuple[list[tuple[str, bytes]], str]] = [
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.caption", b"b")], "its text members say different things"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.json", said({"caption": "b"}))], "`caption` of its json"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.json", said({"text": "b"}))], "`text` of its json"),
    ([("k.jpg", jpg(1)), ("k.txt", b"else"), ("k.json", said(QUESTION))], "its text member says something else"),
    ([("k.jpg", jpg(1)), ("k.json", said({"caption": "a"})), ("k.meta.json", said({"caption": "b"}))], "json members"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.jpg", jpg(2))], "k.jpg stands in the tar twice"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.JPG", jpg(1))], "k.JPG stands in the tar twice"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.png", dot(2))], "nothing tells their order"),
    ([("k.jpg", jpg(1)), ("k.txt", b"a"), ("k.1.jpg", jpg(2))], "nothing tells their order"),
    ([("k.left.jpg", jpg(1)), ("k.right.jpg", jpg(2)), ("k.txt", b"a")], "nothing tells their order"),
    ([("k.0.jpg", jpg(1)), ("k.1.jpg", jpg(2)), ("k.json", said({**QUESTION, "image": "k.0.jpg"}))],
     "`image` of its json names 1 image, the tar has 0.jpg, 1.jpg"),
    ([("k.0.jpg", jpg(1)), ("k.json", said({**QUESTION, "images": ["a", "b"]}))], "names 2 images"),
    ([("k.0.jpg", jpg(1)), ("k.1.jpg", jpg(1)), ("k.json", said({**TWO, "name": ["0", "7"]}))], "its json lists 0, 7"),
    ([("k.jpg", jpg(1)), ("k.json", EMBEDDED)], "others stand in"),
]  # fmt: skip


@pytest.mark.parametrize(("members", "reason"), CONTRADICTIONS)
def test_a_group_that_contradicts_itself_is_rejected(tmp_path: Path, members: Members, reason: str) -> None:
    for order in (members, members[::-1]):
        one = outcome(tmp_path, *order)
        assert one.startswith("bad_record: the members of k contradict one another: "), one
        assert reason in one or reason.replace("k.jpg", "k.JPG") in one or reason.replace("k.JPG", "k.jpg") in one


WITHOUT: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("media_missing", [("k.txt", b"a")]),
    ("media_missing", [("k.json", said({"caption": "a"}))]),
    ("media_missing", [("k.txt", b"a"), ("k.cls", b"3")]),
    ("media_missing", [("k.json", said({**QUESTION, "image": "k.jpg"}))]),
    ("media_missing", [("k.json", said({**QUESTION, "image_path": "old/k.jpg"}))]),
    ("media_count", [("k.json", said(QUESTION))]),
    ("media_count", [("k.jpg", jpg(1)), ("k.json", said(talk("no tag", "a")))]),
    ("media_unread", [("k.seg.png", dot(1)), ("k.jpg", jpg(1)), ("k.txt", b"a")]),
    ("media_unread", [("k.depth.png", dot(1)), ("k.txt", b"a")]),
    ("media_unread", [("k.wav", b"RIFF"), ("k.txt", b"a")]),
    ("media_unread", [("k.npy", b"\x93NUMPY"), ("k.txt", b"a")]),
    ("media_unread", [("k.mp4", clip(1)), ("k.wav", b"RIFF"), ("k.txt", b"a")]),
    ("media_unread", [("k.jpg", jpg(1)), ("k.pdf", b"%PDF"), ("k.json", said(QUESTION))]),
    ("media_unread", [("k.jpg", jpg(1)), ("k.json", said({**QUESTION, "audio": "k.wav"}))]),
    ("bad_record", [("k.jpg", jpg(1))]),
    ("bad_record", [("k.jpg", jpg(1)), ("k.cls", b"3")]),
    ("bad_record", [("k.jpg", jpg(1)), ("k.json", said({"width": 3}))]),
    ("bad_json", [("k.jpg", jpg(1)), ("k.json", b"{")]),
    ("bad_json", [("k.jpg", jpg(1)), ("k.txt", b"\xff\xfe\xfa")]),
    ("empty_turn", [("k.jpg", jpg(1)), ("k.txt", b" \n")]),
    ("tools_unread", [("k.jpg", jpg(1)), ("k.json", said({**QUESTION, "tools": [{"name": "f"}]}))]),
]


@pytest.mark.parametrize(("code", "members"), WITHOUT)
def test_nothing_is_taught_without_what_it_speaks_of(tmp_path: Path, code: str, members: Members) -> None:
    one = outcome(tmp_path, *members)
    assert isinstance(one, str), one
    assert one.startswith(f"{code}: "), one


def test_a_link_is_no_member_to_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        for name, link in (("a.txt", ""), ("a.jpg", "/etc/passwd"), ("b.txt", "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            info.size = 0 if link else 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [one.partition(":")[0] for one in outcomes(tmp_path / "link.tar")] == ["path_escape", "media_missing"]
