"""The ledger after a kill: an incomplete last line and steps after the last checkpoint are removed."""

from __future__ import annotations

from pathlib import Path

from megatron_vita.training.ledger import Ledger, LedgerLine, read_ledger


def line(iteration: int, failed: list[int] | None = None) -> LedgerLine:
    return LedgerLine(
        stage="s",
        iteration=iteration,
        loss=1.0 / iteration,
        grad_norm=0.5,
        lr=1e-3,
        num_labels=3,
        num_tokens=64,
        sample_ids=[iteration],
        failed_samples=failed or [],
        seconds=0.1,
    )


def write(path: Path, iterations: range, *, resume_at: int) -> None:
    ledger = Ledger(path, resume_at=resume_at)
    for iteration in iterations:
        ledger.write(line(iteration))
    ledger.close()


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "ledger.jsonl"
    write(path, range(1, 4), resume_at=0)
    assert [one["iteration"] for one in read_ledger(path)] == [1, 2, 3]


def test_resume_drops_steps_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, range(1, 8), resume_at=0)
    write(path, range(6, 9), resume_at=5)
    assert [one["iteration"] for one in read_ledger(path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, range(1, 3), resume_at=0)
    with path.open("a") as file:
        file.write('{"iteration": 3, "lo')
    assert [one["iteration"] for one in read_ledger(path)] == [1, 2]
    write(path, range(3, 4), resume_at=2)
    assert [one["iteration"] for one in read_ledger(path)] == [1, 2, 3]


def test_failed_samples_are_counted_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, resume_at=0)
    ledger.write(line(1, failed=[4, 5]))
    ledger.write(line(2, failed=[6]))
    ledger.close()
    resumed = Ledger(path, resume_at=1)
    resumed.close()
    assert resumed.failed_samples == {4, 5}
