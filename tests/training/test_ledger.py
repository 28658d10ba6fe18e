"""The ledger after a kill, after damage, and at a restart that costs no more with many lines than with few."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.training import ledger as ledgers
from megatron_vita.training.ledger import Ledger, LedgerLine, keep_later, read_ledger

Saved = dict[str, Any]


def line(iteration: int, failed: list[int] | None = None) -> dict[str, Any]:
    return asdict(
        LedgerLine(
            stage="s",
            iteration=iteration,
            loss=1.0 / iteration,
            grad_norm=0.5,
            lr=1e-3,
            num_labels=3,
            num_tokens=64,
            consumed_packs=4 * iteration,
            failed_samples=failed or [],
            seconds=0.1,
        )
    )


def write(path: Path, iterations: range, *, resume_at: int = 0, saved: Saved | None = None) -> Saved:
    """Write some lines; the file's position afterwards."""
    ledger = Ledger(path, resume_at=resume_at, saved=saved)
    for iteration in iterations:
        ledger.write(line(iteration))
    position = ledger.position()
    ledger.close()
    return position


def numbers(path: Path) -> list[int]:
    return [one["iteration"] for one in read_ledger(path)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "ledger.jsonl"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="megatron_vita")
    return caplog


def errors(heard: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in heard.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("known", [True, False], ids=["position known", "of an earlier release"])
def test_resume_drops_steps_after_the_checkpoint(path: Path, known: bool, heard: pytest.LogCaptureFixture) -> None:
    saved = write(path, range(1, 6))
    write(path, range(6, 9), resume_at=5, saved=saved)
    with path.open("a") as file:
        file.write('{"iteration": 9, "lo')  # killed while writing
    assert numbers(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    write(path, range(6, 8), resume_at=5, saved=saved if known else None)
    assert numbers(path) == [1, 2, 3, 4, 5, 6, 7]
    assert files(path.parent) == ["ledger.jsonl"]
    assert not errors(heard)


def test_the_position_after_a_resume_is_that_of_a_run_in_one_go(path: Path) -> None:
    saved = write(path, range(1, 6))
    resumed = write(path, range(6, 9), resume_at=5, saved=saved)
    whole = write(path.with_name("whole.jsonl"), range(1, 9))
    assert resumed == whole
    assert path.read_bytes() == path.with_name("whole.jsonl").read_bytes()


def _shortened(content: bytes) -> bytes:
    return content[:-1]


def _edited(content: bytes) -> bytes:
    return content.replace(b"0.5", b"0.4", 1)


def _broken(content: bytes) -> bytes:
    return content.replace(b'{"stage"', b"?????????", 1)


@pytest.mark.parametrize("spoil", [_shortened, _edited, _broken])
def test_a_spoiled_ledger_is_named_and_set_aside_and_the_run_goes_on(
    path: Path, spoil: Callable[[bytes], bytes], heard: pytest.LogCaptureFixture
) -> None:
    for names in (["ledger.damaged.jsonl"], ["ledger.damaged.jsonl", "ledger.damaged.jsonl.2"]):
        heard.clear()
        path.unlink(missing_ok=True)
        saved = write(path, range(1, 6))
        spoiled = spoil(path.read_bytes())
        path.write_bytes(spoiled)
        write(path, range(6, 8), resume_at=5, saved=saved)
        assert numbers(path) == [6, 7]
        assert files(path.parent) == sorted([*names, "ledger.jsonl"])
        assert (path.parent / names[-1]).read_bytes() == spoiled
        (message,) = errors(heard)
        assert str(path) in message
        assert names[-1] in message


def test_a_ledger_that_is_missing_is_said_to_be(path: Path, heard: pytest.LogCaptureFixture) -> None:
    saved = write(path, range(1, 6))
    path.unlink()
    write(path, range(6, 8), resume_at=5, saved=saved)
    assert numbers(path) == [6, 7]
    assert ["is missing" in message for message in errors(heard)] == [True]


@pytest.mark.parametrize(
    "rest", [b"no json\n", b'{"iteration": 3}\n', b'{"iteration": 7}\n{"iteration": 7}\n', b"[1]\n"]
)
def test_a_rest_that_no_killed_run_leaves_is_kept(path: Path, rest: bytes, heard: pytest.LogCaptureFixture) -> None:
    saved = write(path, range(1, 6))
    with path.open("ab") as file:
        file.write(rest)
    write(path, range(6, 7), resume_at=5, saved=saved)
    assert numbers(path) == [1, 2, 3, 4, 5, 6]
    assert (path.parent / "ledger.after_0000005.jsonl").read_bytes() == rest
    assert len(errors(heard)) == 1


def test_broken_lines_under_a_checkpoint_of_an_earlier_release(path: Path, heard: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    old = [json.dumps({"iteration": k, "sample_ids": [k], "failed_samples": [k] if k > 1 else []}) for k in range(1, 5)]
    old[1] = old[1][:-4]
    path.write_text("".join(text + "\n" for text in old))
    ledger = Ledger(path, resume_at=3)
    ledger.close()
    assert numbers(path) == [1, 3]
    assert ledger.failed_samples == {3}
    assert files(path.parent) == ["ledger.damaged.jsonl", "ledger.jsonl"]
    assert len(errors(heard)) == 1


def test_failed_samples_are_counted_over_a_resume_under_a_checkpoint_of_an_earlier_release(path: Path) -> None:
    ledger = Ledger(path, resume_at=0)
    ledger.write(line(1, failed=[4, 5]))
    ledger.write(line(2, failed=[6]))
    ledger.close()
    resumed = Ledger(path, resume_at=1)
    resumed.close()
    assert resumed.failed_samples == {4, 5}


@pytest.mark.parametrize("known", [True, False])
def test_later_lines_go_to_a_file_with_a_name_of_its_own(path: Path, known: bool) -> None:
    saved = write(path, range(1, 4))
    before = path.read_bytes()
    for name in ("ledger.after_0000003.jsonl", "ledger.after_0000003.jsonl.2"):
        write(path, range(4, 8), resume_at=3, saved=saved)
        assert keep_later(path, 3, saved if known else None) == name
        assert path.read_bytes() == before
        assert numbers(path.with_name(name)) == [4, 5, 6, 7]
    assert keep_later(path, 3, saved) is None
    assert keep_later(path.with_name("absent.jsonl"), 3, saved) is None


@given(
    steps=st.integers(1, 12),
    at=st.data(),
    flip=st.integers(1, 255),
)
def test_no_change_within_the_saved_bytes_is_overlooked(
    tmp_path_factory: pytest.TempPathFactory, steps: int, at: st.DataObject, flip: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "ledger.jsonl"
    saved = write(path, range(1, steps + 1))
    content = bytearray(path.read_bytes())
    content[at.draw(st.integers(0, len(content) - 1))] ^= flip
    path.write_bytes(content)
    write(path, range(steps + 1, steps + 2), resume_at=steps, saved=saved)
    assert path.with_name("ledger.damaged.jsonl").read_bytes() == content
    assert numbers(path) == [steps + 1]


def test_a_restart_parses_no_line_and_needs_no_memory_for_them(path: Path) -> None:
    saved = write(path, range(1, 101))
    hundred = path.read_bytes()
    path.write_bytes(hundred * 1000)  # as many bytes as 100,000 steps write
    digest, count = ledgers._digest_of(path, 1000 * len(hundred))
    many = {"bytes": count, "xxh3_128": digest.hexdigest()}
    peaks = []
    for position, content in ((saved, hundred), (many, hundred * 1000)):
        path.write_bytes(content)
        tracemalloc.start()
        with mock.patch.object(json, "loads", side_effect=AssertionError("a line was parsed")):
            Ledger(path, resume_at=100, saved=position).close()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert path.stat().st_size == len(content)
    assert max(peaks) < 3 << 20
