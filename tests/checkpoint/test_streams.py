"""Threads, buffers and files: failures leave nothing running, nothing shared and nothing half said."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.checkpoint import streams
from megatron_vita.checkpoint.streams import Buffers, OutputFile, Workers, digest_of, read_exactly, reading
from megatron_vita.errors import CheckpointError
from megatron_vita.files import new_digest


def test_results_come_in_order_and_few_items_are_begun_ahead() -> None:
    begun: list[int] = []
    with Workers(2) as pool:
        results = pool.map(lambda item: begun.append(item) or item, range(20))  # type: ignore[func-returns-value]
        assert next(results) == 0
        assert len(begun) <= 4
        assert list(results) == list(range(1, 20))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_nothing_runs_any_more_when_a_failure_is_seen(kind: type[BaseException]) -> None:
    """Whoever sees it closes the file that the others still write."""
    started, go, ended = threading.Event(), threading.Event(), []

    def act(item: int) -> int:
        if item == 0:
            assert started.wait(60)
            threading.Timer(0.05, go.set).start()
            raise kind("no")
        started.set()
        assert go.wait(60)
        ended.append(item)
        return item

    with Workers(2) as pool:
        with pytest.raises(kind):
            list(pool.map(act, range(8)))
        assert 1 in ended


def test_nothing_runs_any_more_when_the_one_who_asked_stops() -> None:
    started, go, ended = threading.Event(), threading.Event(), []

    def act(item: int) -> int:
        if item:
            started.set()
            assert go.wait(60)
            ended.append(item)
        return item

    def stop_at_the_first() -> None:
        for _ in pool.map(act, range(4)):
            assert started.wait(60)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with Workers(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            stop_at_the_first()
        assert 1 in ended


def test_a_closed_file_takes_nothing_although_its_number_is_used_again(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "first") as first:
        first.write([b"mine"], 0)
    with OutputFile(tmp_path / "second") as second:
        second.write([b"yours"], 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            first.write([b"late"], 0)
    assert (tmp_path / "first").read_bytes() == b"mine"
    assert (tmp_path / "second").read_bytes() == b"yours"


def test_writes_go_on_where_the_system_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwritev

    def little(descriptor: int, parts: list[memoryview], position: int) -> int:
        return write(descriptor, [parts[0][:3]], position)

    monkeypatch.setattr(os, "pwritev", little)
    with OutputFile(tmp_path / "file") as file:
        file.write([b"0123456", b"", memoryview(b"789ab"), b"cd"], 2)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789abcd"


def test_reads_go_on_where_the_system_stopped_and_say_where_a_file_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, views, at: read(number, [views[0][:3]], at))
    target = bytearray(8)
    with reading(tmp_path / "file") as descriptor:
        read_exactly(descriptor, memoryview(target), 1, tmp_path / "file")
        assert target == b"12345678"
        with pytest.raises(CheckpointError, match="file: ends at byte 10, before what was promised"):
            read_exactly(descriptor, memoryview(target), 3, tmp_path / "file")


def test_what_cannot_be_read_is_no_failure_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file or directory\)"):
        digest_of(tmp_path / "gone", 0, 4)
    (tmp_path / "file").write_bytes(b"0123")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"file: cannot be read at byte 1 \(Input/output error\)"):
        digest_of(tmp_path / "file", 1, 3)


def test_memory_is_kept_up_to_a_limit_and_never_handed_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 16)
    buffers = Buffers(40)
    small, large, third = buffers.take(4), buffers.take(20), buffers.take(16)
    assert [len(one) for one in (small, large, third)] == [16, 20, 16]
    for one in (large, small, third):
        buffers.give(one)  # the third has no room
    assert buffers.take(20) is large
    assert buffers.take(1) is small
    assert all(buffers.take(1) is not one for one in (small, large, third))


def test_a_digest_is_of_the_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 4)
    content = bytes(range(40))
    (tmp_path / "file").write_bytes(content)
    for algorithm in ("xxh3_128", "sha256"):
        expected = new_digest(algorithm)
        expected.update(content[3:25])
        assert digest_of(tmp_path / "file", 3, 22, algorithm) == expected.hexdigest()


def test_bits_of_any_shape_are_bytes() -> None:
    assert streams.raw(np.arange(3, dtype=np.uint16)).tobytes() == b"\0\0\1\0\2\0"
    assert streams.raw(np.array(7, np.uint8)).tobytes() == b"\7"
    assert len(streams.raw(np.empty((0, 3), np.uint32))) == 0


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=6), st.integers(1, 4))
def test_sources_are_read_in_turn_and_each_in_its_order(sources: list[list[int]], count: int) -> None:
    items = list(streams.in_turn([[(number, one) for one in source] for number, source in enumerate(sources)], count))
    for number, source in enumerate(sources):
        assert [one for where, one in items if where == number] == source
    begun = [number for number, source in enumerate(sources) if source]
    seen: list[int] = list(dict.fromkeys(number for number, _ in items))
    assert seen == begun, "sources are begun in their order"
    for at in range(len(items)):
        unfinished = {number for number, _ in items[:at]} & {number for number, _ in items[at:]}
        assert len(unfinished) <= count
