"""Threads and whole reads: failures leave nothing running and say which file and where."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from megatron_vita.checkpoint import streams
from megatron_vita.checkpoint.streams import Workers, digest_of, read_exactly, reading
from megatron_vita.errors import CheckpointError, DamagedError
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
        with pytest.raises(DamagedError, match="file: ends at byte 10, before what was promised"):
            read_exactly(descriptor, memoryview(target), 3, tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "damage"), [(errno.EIO, True), (errno.ENOENT, True), (errno.EACCES, False), (errno.EMFILE, False)]
)
def test_what_the_disk_cannot_give_is_damage_and_what_the_system_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, damage: bool
) -> None:
    (tmp_path / "file").write_bytes(b"0123")

    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    for name, place in (("preadv", " at byte 1"), ("open", "")):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            reason = rf"file: cannot be read{place} \({os.strerror(number)}"
            with pytest.raises(CheckpointError, match=reason) as caught:
                digest_of(tmp_path / "file", 1, 3)
        assert isinstance(caught.value, DamagedError) == damage


def test_a_digest_is_of_the_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 4)
    content = bytes(range(40))
    (tmp_path / "file").write_bytes(content)
    expected = new_digest()
    expected.update(content[3:25])
    assert digest_of(tmp_path / "file", 3, 22) == expected.hexdigest()
