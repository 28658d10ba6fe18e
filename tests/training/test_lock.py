"""Of two runs on one folder the second is refused before it writes; a killed run holds nothing."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vita import files
from megatron_vita.errors import ConfigError
from megatron_vita.training import stages
from megatron_vita.training.lock import LOCK_FILE, RunLock
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import alone, make_shards, recipe

FORK = multiprocessing.get_context("fork")
SAVE = "runs/mine"


def take(folder: Path) -> RunLock:
    lock = RunLock()
    lock.take({str(folder / SAVE): "align"})
    return lock


def _contend(folder: Path, go: Any, told: Connection) -> None:
    """Take the lock once everybody is ready, tell how it went, and hold it until told to end."""
    go.wait()
    try:
        lock = take(folder)
    except ConfigError as error:
        told.send(str(error))
    else:
        told.send(None)
        told.recv()
        lock.__exit__(None, None, None)
    told.close()


@contextmanager
def contenders(folder: Path, count: int) -> Iterator[list[tuple[Any, Connection]]]:
    go = FORK.Barrier(count)
    processes = []
    for _ in range(count):
        here, there = FORK.Pipe()
        process = FORK.Process(target=_contend, args=(folder, go, there))
        process.start()
        processes.append((process, here))
    try:
        yield processes
    finally:
        for process, _ in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("pair", range(16))
def test_of_two_runs_that_start_at_once_one_is_refused_and_says_who_trains(tmp_path: Path, pair: int) -> None:
    with contenders(tmp_path, 2) as pairs:
        answers = [told.recv() for _, told in pairs]
        (winner,) = [one for one, answer in zip(pairs, answers, strict=True) if answer is None]
        (message,) = filter(None, answers)
        assert "another run is training there (" in message
        # its name may not be written yet when both start at the same instant; then it is unknown, never another's
        with pytest.raises(ConfigError, match=rf"process {winner[0].pid}, since \d{{4}}-"):
            take(tmp_path)
        winner[1].send("end")
        winner[0].join()
    take(tmp_path).__exit__(None, None, None)


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    with contenders(tmp_path, 1) as [(process, told)]:
        assert told.recv() is None
        with pytest.raises(ConfigError):
            take(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        take(tmp_path).__exit__(None, None, None)


def _with_a_child(folder: Path, told: Connection, ending: Connection) -> None:
    lock = take(folder)  # (one that is not kept is closed, and held no more)
    if not os.fork():
        ending.poll(None)  # until the test closes its end: the child outlives its parent
        os._exit(0)
    told.send(None)
    told.recv()
    del lock


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    told, there = FORK.Pipe()
    end, ending = FORK.Pipe()
    process = FORK.Process(target=_with_a_child, args=(tmp_path, there, ending))
    process.start()
    told.recv()
    with pytest.raises(ConfigError):
        take(tmp_path)
    process.kill()
    process.join()
    take(tmp_path).__exit__(None, None, None)
    end.send("end")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(files.fcntl, "lockf", side_effect=OSError(number, os.strerror(number))):
        take(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_another_failure_to_lock_is_an_error(tmp_path: Path) -> None:
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(files.fcntl, "lockf", side_effect=failure), pytest.raises(ConfigError, match="Input/output"):
        take(tmp_path)


def test_one_folder_under_two_names_is_locked_once(tmp_path: Path) -> None:
    lock = RunLock()
    lock.take({str(tmp_path / SAVE): "one", str(tmp_path / "runs/../runs/mine"): "two"})
    with contenders(tmp_path, 1) as [(_, told)]:
        assert told.recv() is not None
    lock.__exit__(None, None, None)


def _refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="another run is training there"):
        run_stages(recipe(folder, SAVE.replace("/", "_"), alone()[:1], checkpoint={"save": str(folder / SAVE)}))


def test_a_second_run_is_refused_on_every_rank_before_it_writes(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with contenders(tmp_path, 1) as [(_, told)]:
        assert told.recv() is None
        before = sorted((tmp_path / SAVE).rglob("*"))
        run_ranks(2, _refused, tmp_path)
        assert sorted((tmp_path / SAVE).rglob("*")) == before == [tmp_path / SAVE / LOCK_FILE]
        told.send("end")


def _contended(folder: Path) -> None:
    """Train; while it does, another process tries to."""
    train = stages.train

    def watched(*args: Any) -> Path:
        with contenders(folder, 1) as [(_, told)]:
            assert f"process {os.getpid()}, " in told.recv()
        return train(*args)

    with mock.patch.object(stages, "train", watched):
        run_stages(recipe(folder, "first", alone()[:1], checkpoint={"save": str(folder / SAVE)}))


def test_a_run_holds_its_folder_while_it_trains_and_no_longer(tmp_path: Path) -> None:
    make_shards(tmp_path)
    run_ranks(1, _contended, tmp_path)
    take(tmp_path).__exit__(None, None, None)
