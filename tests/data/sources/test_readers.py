"""Readers: every container gives the same records, in any order, in bounded memory, whatever lies beside them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.sample import MediaFile, Sample
from megatron_vita.data.sources import open_reader, read_samples, readers
from megatron_vita.data.sources.media_store import build_once
from megatron_vita.data.sources.media_store import compressed as packed
from megatron_vita.data.sources.readers import parquet, prepare, scan
from megatron_vita.errors import ConfigError, DataError


def records(path: Path, kind: str = "auto", work: Path | None = None) -> list[tuple[int, Any]]:
    reader = open_reader(path, kind, work)
    return [(line, "bad" if isinstance(r, DataError) else r) for line, r in reader.read(reader.index())]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda c: st.lists(c, max_size=3), max_leaves=6
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=6)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    content=RECORDS,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    block=st.integers(1, 40),
)
def test_both_json_forms_give_their_records(
    tmp_path_factory: pytest.TempPathFactory,
    content: list[dict],
    indent: int | None,
    ascii_only: bool,
    bom: bool,
    block: int,
) -> None:
    folder = tmp_path_factory.mktemp("json")
    mark = "\ufeff" if bom else ""
    (folder / "a.json").write_text(mark + json.dumps(content, indent=indent, ensure_ascii=ascii_only), "utf-8")
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in content)
    (folder / "l.json").write_text(mark + lines, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BLOCK", block)
        assert records(folder / "a.json") == list(enumerate(content, 1))
        assert records(folder / "l.json") == list(enumerate(content, 1))
        assert open_reader(folder / "a.json").head(2) == content[:2]
        assert open_reader(folder / "l.json").head(2) == content[:2]


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(content=RECORDS.filter(bool), form=st.sampled_from(sorted(PACK)), array=st.booleans(), seed=st.integers(0, 99))
def test_every_container_gives_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, content: list[dict], form: str, array: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("same")
    lines = "\n".join(map(json.dumps, content)).encode()
    text = json.dumps(content, indent=1).encode() if array else lines
    many = {f"m/{n:03}.json": json.dumps(record, indent=1).encode() for n, record in enumerate(content)}
    beside = {"__MACOSX/m/._000.json": b"\0", "m/.DS_Store": b"x", "README.md": b"#"}
    files = {
        "packed": PACK[form](text),
        "twice": PACK[form](text[:7]) + PACK[form](text[7:]),  # several streams are one file
        "zip": zip_of(beside | dict(reversed(many.items()))),
        "stored.zip": zip_of(many, zipfile.ZIP_STORED),
        "tar": tar_of(many | beside),
        "tar.packed": PACK[form](tar_of(beside | {"a.jsonl": lines})),
        "one.zip": zip_of({"all.json": json.dumps(content).encode()}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        assert records(folder / name, work=folder / "work") == list(enumerate(content, 1)), name
        reader = open_reader(folder / name, work=folder / "work")
        offsets = reader.index()
        order = random.Random(seed).choices(range(len(offsets)), k=5)
        assert [record for _, record in reader.read(offsets[order])] == [content[n] for n in order], name
        assert reader.head(2) == content[:2]


def test_a_broken_record_hurts_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'[{"a": 1}, {"b": "x" 2}, {"c": "[},{\\"]"},\n {"d": "\xff"}, {"say": "he said "hi", ok"}, 7, {"e": 5}]'
    )
    got = records(tmp_path / "a.json")
    assert [line for line, _ in got] == list(range(1, 8))
    assert [r for _, r in got] == [{"a": 1}, "bad", {"c": '[},{"]'}, "bad", "bad", "bad", {"e": 5}]
    (tmp_path / "l.jsonl").write_bytes(b'{"a": 1}\n\n{"b": \n{"c": 3}\r\n' + b"[" * 100000 + b"\n{}")
    assert records(tmp_path / "l.jsonl") == [(1, {"a": 1}), (3, "bad"), (4, {"c": 3}), (5, "bad"), (6, {})]
    (tmp_path / "cut.json").write_bytes(b'[{"a": 1}, {"b": 2')
    assert records(tmp_path / "cut.json") == [(1, {"a": 1}), (2, "bad")]
    (tmp_path / "more.json").write_bytes(b'[{"a": 1}]\n[{"a": 2}')
    assert records(tmp_path / "more.json", "json") == [(1, {"a": 1}), (2, "bad")]
    (tmp_path / "nan.json").write_bytes(b'\xef\xbb\xbf [{"a": NaN}]')
    ((_, record),) = records(tmp_path / "nan.json")
    assert np.isnan(record["a"])
    (tmp_path / "empty.json").write_bytes(b"")
    assert records(tmp_path / "empty.json") == []


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "damage",
    [
        ('"open', "open"),  # a quote is missing
        ('"id": 3', '"id": 3, "x": {'),  # a bracket too many
        ('open"', "open"),
        ('"id": 3', '"id": 3]]'),
    ],
)
def test_a_record_that_does_not_pair_up_swallows_no_other(
    tmp_path: Path, damage: tuple[str, str], indent: int | None
) -> None:
    talk = [{"from": "human", "value": 'say "[}, {", ok'}, {"from": "gpt", "value": "a, b"}] * 2
    content = [{"id": n, "conversations": talk, "image": "open"} for n in range(8)]
    texts = [json.dumps(record, indent=indent) for record in content]
    texts[3] = texts[3].replace(*damage)
    (tmp_path / "a.json").write_text("[" + ", ".join(texts) + "]")
    got = [record for _, record in records(tmp_path / "a.json", "json")]
    assert [record for record in got if record != "bad"] == content[:3] + content[4:]
    assert got.count("bad") >= 1
    lines = [line for line, _ in records(tmp_path / "a.json", "json")]
    assert lines == list(range(1, len(got) + 1))


@pytest.mark.slow
@given(text=st.binary(max_size=60).map(lambda data: bytes(b'[]{}",\\ a\n'[byte % 10] for byte in data)))
@settings(deadline=None, max_examples=300)
def test_any_text_is_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    """Offsets ascend, do not overlap, and leave nothing out but separators, the same in small blocks as in large."""
    path = tmp_path_factory.mktemp("any") / "x"
    for kind, content in (("json", b"[" + text), ("jsonl", text)):
        path.write_bytes(content)
        offsets = open_reader(path, kind).index()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "_BLOCK", 3)
            assert np.array_equal(open_reader(path, kind).index(), offsets)
        ends = offsets[:, 1:].ravel()
        assert (np.diff(ends) >= 0).all()
        left = bytearray(content)
        for _, start, stop in offsets[::-1].tolist():
            del left[start:stop]
        assert not left.strip(b"[]},\n ")


def test_bare_message_lists_a_line(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "b.jsonl").write_text((json.dumps(talk) + "\n") * 3)
    assert records(tmp_path / "b.jsonl") == [(n, talk) for n in (1, 2, 3)]
    (sample, _), *_ = read_samples(tmp_path / "b.jsonl")
    assert isinstance(sample, Sample)
    assert len(sample.messages) == 2
    long = [{"role": "user", "content": "a" * (3 << 20)}, talk[1]]  # the line is longer than what is looked at
    (tmp_path / "c.jsonl").write_text((json.dumps(long) + "\n") * 2)
    assert records(tmp_path / "c.jsonl") == [(1, long), (2, long)]
    (tmp_path / "one.zip").write_bytes(zip_of({"t.json": json.dumps(talk, indent=2).encode()}))
    assert records(tmp_path / "one.zip") == [(1, talk)]
    (tmp_path / "array.json").write_text(json.dumps([{"content": "x", "n": 1}] * 2))
    assert records(tmp_path / "array.json") == [(n, {"content": "x", "n": 1}) for n in (1, 2)]


# ---------------------------------------------------------------------------------------------------- parquet


def test_parquet_rows_by_group(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(230))}), tmp_path / "p.parquet", row_group_size=100)
    reader = open_reader(tmp_path / "p.parquet")
    offsets = reader.index()
    assert [r["n"] for _, r in reader.read(offsets)] == list(range(230))
    some = offsets[[3, 99, 100, 170, 229]]
    assert [(line, r["n"]) for line, r in reader.read(some)] == [(4, 3), (100, 99), (101, 100), (171, 170), (230, 229)]
    assert [len(chunk) for chunk in reader.chunks(some, 1)] == [2, 2, 1]
    (tmp_path / "q.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="parquet"):
        open_reader(tmp_path / "q.parquet").index()


def test_parquet_records_that_repeat_are_all_read(tmp_path: Path) -> None:
    """A ratio above 1 in a file of one row group: the second round begins it anew."""
    pq.write_table(pa.table({"n": list(range(50))}), tmp_path / "p.parquet")
    reader = open_reader(tmp_path / "p.parquet")
    offsets = reader.index()
    wanted = [*range(50), 1, 2, 40]
    twice = offsets[wanted]
    assert [r["n"] for _, r in reader.read(twice)] == wanted
    assert [r["n"] for chunk in reader.chunks(twice, 128) for _, r in reader.read(chunk)] == wanted


@pytest.mark.parametrize("name", [one for one in dir(pa.lib) if one.startswith("Arrow")])
@pytest.mark.parametrize("place", ["open", "batches", "row"])
def test_whatever_pyarrow_raises_rejects_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    error = getattr(pa.lib, name)
    if not (isinstance(error, type) and issubclass(error, Exception)):
        pytest.skip("no error")
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "p.parquet")
    reader = open_reader(tmp_path / "p.parquet")
    offsets = reader.index()

    def fail(*_: Any, **__: Any) -> Any:
        raise error("odd")

    if place == "open":
        monkeypatch.setattr(pq, "ParquetFile", fail)
        with pytest.raises(DataError, match=r"p\.parquet: not a whole parquet file \(.*odd.*Fetch it again"):
            reader.index()
        return
    if place == "batches":
        monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    else:
        monkeypatch.setattr(parquet, "dict", fail, raising=False)
    for _, record in reader.read(offsets):
        assert str(record).startswith("bad_record: the row")
        assert "odd" in str(record)


def test_a_row_of_parquet_that_python_cannot_hold_is_rejected_alone(tmp_path: Path) -> None:
    raw = pa.py_buffer(b"ok\xff\xfeok")
    starts = pa.py_buffer(np.array([0, 2, 4, 6], dtype=np.int32).tobytes())
    columns = {
        "text": pa.Array.from_buffers(pa.string(), 3, [None, starts, raw]),
        "when": pa.array([0, 2**62, 0], pa.timestamp("us")),
        "day": pa.array([0, 2**30, 0], pa.date32()),
        "fine": pa.array([0, 1, 0], pa.timestamp("ns")),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({name: column}), tmp_path / f"{name}.parquet")
        first, second, third = (record for _, record in records(tmp_path / f"{name}.parquet"))
        assert (type(first), second, type(third)) == (dict, "bad", dict)


def test_json_that_python_will_not_parse_is_rejected_alone(tmp_path: Path) -> None:
    odd = ["[" * 100_000, '{"a":' * 100_000, '{"n": ' + "9" * 5000 + "}", '{"n": 1e99999}', '{"t": "\\ud800"}']
    (tmp_path / "r.jsonl").write_text("\n".join(['{"a": 1}', *odd, '{"a": 2}']))
    found = [record == "bad" for _, record in records(tmp_path / "r.jsonl")]
    assert found == [False, True, True, True, False, False, False]


def test_parquet_columns_of_any_type(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": b"png", "path": None}, None], struct),
            "images": pa.array([[{"bytes": b"1", "path": "x"}], []], pa.list_(struct)),
            "raw": pa.array([b"jpg", None], pa.large_binary()),
            "words": pa.array(["a", "a"]).dictionary_encode(),
            "turns": pa.array([[{"from": "human", "value": "q"}], None]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    first, second = (record for _, record in records(tmp_path / "t.parquet"))
    assert first == {
        "image": {"bytes": b"png", "path": None},
        "images": [{"bytes": b"1", "path": "x"}],
        "raw": b"jpg",
        "words": "a",
        "turns": [{"from": "human", "value": "q"}],
    }
    assert second == {"image": None, "images": [], "raw": None, "words": "a", "turns": None}


def test_a_broken_row_group_hurts_no_other(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    options = pq.ParquetWriter(path, pa.schema([("n", pa.string())]), compression="zstd", use_dictionary=False)
    with options as writer:
        for group in range(3):
            writer.write_table(pa.table({"n": [f"{group}-{n}-{random.Random(n).random()}" for n in range(200)]}))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    got = records(path)
    assert [line for line, _ in got] == list(range(1, 601))
    assert [line for line, record in got if record == "bad"] == list(range(201, 401))


# ---------------------------------------------------------------------------------------------------- packed, archives


def test_files_that_no_reader_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such data file"):
        open_reader(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"[]")
    with pytest.raises(ConfigError, match="no reader 'xml'"):
        open_reader(tmp_path / "a.json", "xml")
    with pytest.raises(ConfigError, match="neither a zip nor a tar"):
        open_reader(tmp_path / "a.json", "archive_json").index()


@pytest.mark.parametrize("form", sorted(PACK))
def test_a_packed_file_that_is_damaged_is_named(tmp_path: Path, form: str) -> None:
    data = PACK[form](random.Random(1).randbytes(200000))
    for damage in (data[:-40], data[: len(data) // 2], data[:99999] + b"????" + data[100003:]):
        path = tmp_path / f"a.{form}"
        path.write_bytes(damage)
        if damage[-40:] == data[-40:] and form == "zst":
            continue  # zstd stores what it cannot pack, and the library writes no checksum unless asked
        with pytest.raises(DataError, match=rf"a\.{form}: .*Fetch it again"):
            prepare(path, "jsonl", tmp_path / "work")
        assert not [one for one in (tmp_path / "work/unpacked").iterdir() if one.suffix not in (".partial", ".lock")]


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BOMB_FLOOR", 1 << 20)
    for form, pack in PACK.items():
        (tmp_path / form).write_bytes(pack(bytes(8 << 20)))
        with pytest.raises(DataError, match="beyond 250 to 1"):
            prepare(tmp_path / form, "jsonl", tmp_path / "work")
        (tmp_path / form).write_bytes(pack(b'{"a": 1}\n' * 1000))  # small, though it packs well
        assert len(records(tmp_path / form, work=tmp_path / "work")) == 1000


def test_what_was_unpacked_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, work = tmp_path / "a.jsonl.gz", tmp_path / "work"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    prepare(path, work=work, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(readers.packed, "unpack", None)
        assert records(path, work=work) == [(1, {"a": 1})]
    path.write_bytes(gzip.compress(b'{"a": 2}\n{"a": 3}\n'))
    (work / "unpacked" / "left over.partial").touch()
    assert [record["a"] for _, record in records(path, work=work)] == [2, 3]
    assert len([one for one in (work / "unpacked").iterdir() if not one.suffix]) == 1


def test_what_is_made_once_is_made_by_one(tmp_path: Path) -> None:
    """Others wait for it; who fails leaves nothing behind under the name."""
    source = tmp_path / "source"
    source.touch()
    made: list[int] = []
    started, two = threading.Barrier(4), threading.Event()

    def build(target: Path) -> None:
        made.append(1)
        if len(made) > 1:
            two.set()
        two.wait(0.2)  # time for another to come in, were the door not locked
        target.write_bytes(b"whole")

    def ask() -> Path:
        started.wait()
        return build_once(tmp_path / "work", "things", [source], build)

    with ThreadPoolExecutor(4) as pool:
        targets = {future.result() for future in [pool.submit(ask) for _ in range(4)]}
    assert made == [1]
    assert {target.read_bytes() for target in targets} == {b"whole"}

    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(ConfigError, match=r"source cannot be unpacked or indexed there \(No space left"):
        build_once(tmp_path / "work", "other", [source], fail)
    assert build_once(tmp_path / "work", "other", [source], build).read_bytes() == b"whole"


def test_a_member_that_cannot_be_read_is_one_broken_record(tmp_path: Path) -> None:
    data = bytearray(zip_of({f"{n}.json": json.dumps({"n": n, "x": "y" * 200}).encode() for n in range(3)}))
    data[data.index(b"1.json") + 16] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    assert [record if record == "bad" else record["n"] for _, record in records(tmp_path / "a.zip")] == [0, "bad", 2]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, link in (("0.json", ""), ("1.json", "/etc/passwd"), ("2.json", "")):
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE if link else tarfile.REGTYPE
            info.linkname, info.size = link, 0 if link else 2
            tar.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    assert [record for _, record in records(tmp_path / "a.tar")] == [{}, "bad", {}]
    (tmp_path / "b.zip").write_bytes(zip_of({"b.json": b'{"a": \n 1', "c.json": b'{"a": 1,\n "b": 2}', "d.json": b""}))
    assert [record for _, record in records(tmp_path / "b.zip")] == ["bad", {"a": 1, "b": 2}]
    (tmp_path / "l.zip").write_bytes(zip_of({"l.json": b'{"a": \n{"a": 2}\n'}))
    assert [record for _, record in records(tmp_path / "l.zip")] == ["bad", {"a": 2}]


# ---------------------------------------------------------------------------------------------------- WebDataset


def region(file: MediaFile) -> bytes:
    assert file.path is not None
    assert file.size is not None
    return Path(file.path).read_bytes()[file.offset : file.offset + file.size]


def wds(tmp_path: Path, files: dict[str, bytes], mode: str = "w") -> list[Any]:
    (tmp_path / "w.tar").write_bytes(tar_of(files, mode))
    return [record for _, record in records(tmp_path / "w.tar", "wds", tmp_path / "work")]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_groups(tmp_path: Path, mode: str) -> None:
    talk = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "a"}]
    named = {"texts": talk, "media": "image", "name": ["1_b.jpg", "0_a.x.png"]}
    files = {
        "d/1.10.jpg": b"ten",
        "d/1.2.jpg": b"two",
        "d/1.json": json.dumps({"conversations": talk, "images": ["old/a.jpg", "old/b.jpg"]}).encode(),
        "d/2.json": json.dumps(named).encode(),
        "d/2.0_a.x.png": b"first",
        "d/2.1_b.jpg": b"second",
        "d/3.jpg": b"three",
        "d/3.txt": b"a caption",
        "d/4.mp4": b"film",
        "d/4.json": json.dumps(talk).encode(),
        "d/5.jpg": b"alone",
        "e/5.json": b"{broken",
        "e/6.json": b'{"texts": [{"user": "q", "assistant": "a"}]}',
    }
    one, two, three, four, five, broken, six = wds(tmp_path, files, mode)
    assert list(map(region, one["images"])) == [b"two", b"ten"]
    assert one["conversations"] == talk
    assert list(map(region, two["images"])) == [b"second", b"first"]
    assert two["messages"] == talk
    assert list(map(region, three["images"])) == [b"three"]
    assert [turn["content"] for turn in three["messages"]] == ["<image>", "a caption"]
    assert four["messages"] == talk
    assert list(map(region, four["videos"])) == [b"film"]
    assert (five, broken) == ("bad", "bad")
    assert six == {"texts": [{"user": "q", "assistant": "a"}]}


def test_members_that_are_not_read_are_named(tmp_path: Path) -> None:
    data = bytearray(zip_of({"a.json": b'{"text": "a"}', "b.json": b'{"text": "b"}' * 99, "../c.json": b"{}"}))
    at = data.index(b"b.json") + 20
    data[at : at + 4] = b"\xff" * 4
    (tmp_path / "r.zip").write_bytes(data)
    reader = open_reader(tmp_path / "r.zip", "archive_json", tmp_path / "w")
    said = [str(record) for _, record in reader.read(reader.index())]
    assert said[0] == "{'text': 'a'}"
    assert said[1].startswith("bad_record: b.json: the member cannot be read: it is damaged (")
    assert said[2] == (
        "bad_record: c.json: the member cannot be read: its name in the archive is absolute or leaves the folder."
    )


def test_a_zip_is_no_webdataset(tmp_path: Path) -> None:
    (tmp_path / "w.zip").write_bytes(zip_of({"a.json": b"{}"}))
    with pytest.raises(ConfigError, match="WebDataset is a tar"):
        open_reader(tmp_path / "w.zip", "wds").index()


# ---------------------------------------------------------------------------------------------------- memory

_CHILD = """
import re, sys
from pathlib import Path
from megatron_vita.data.sources import open_reader
from megatron_vita.errors import DataError
reader = open_reader(Path(sys.argv[1]))
offsets = reader.index()
bad = sum(isinstance(record, DataError) for _, record in reader.read(offsets[:: max(1, len(offsets) // 50)]))
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # getrusage counts the parent's, too
print(len(offsets), bad, peak[1])
"""


def peak(path: Path) -> tuple[int, int, int]:
    """(records, broken ones among those read, most KiB) of a process that lists a file's records and reads some."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
    offsets, bad, most = map(int, done.stdout.split())
    return offsets, bad, most


def write_large(path: Path, form: str) -> int:
    record = json.dumps({"id": 1, "conversations": [{"from": "human", "value": 'a "b" \\ c, [d] ' * 400}]}).encode()
    with path.open("wb") as out:
        if form == "array":  # 128 MiB
            batch = (record + b",\n") * 1000
            count = 1 + (1 << 27) // len(batch)
            out.write(b"[")
            for _ in range(count):
                out.write(batch)
            out.write(record + b"]")
            return count * 1000 + 1
        plain = json.dumps({"text": "long"}).encode()
        big = 5 << 20 if form == "record" else 100 << 20
        emoji = "\N{SNOWMAN} \U0001f600".encode()
        out.write(plain + b'\n{"text": "' + emoji + b"word, " * (big // 6) + b'"}\n' + plain + b"\n")
        return 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("form", "bound_mib"), [("array", 100), ("line", 1024), ("record", 100)])
def test_memory_is_bounded(tmp_path: Path, form: str, bound_mib: int) -> None:
    """Records of an array take less than the file; a record of 100 MiB is held as bytes, text and object."""
    path = tmp_path / "large.json"
    count = write_large(path, form)
    try:
        offsets, bad, most = peak(path)
    finally:
        path.unlink()
    assert (offsets, bad) == (count, 0)
    assert most < bound_mib << 10, f"{most / 1024:.0f} MiB"
