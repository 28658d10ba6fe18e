"""Saves in the background: what save() saw is what is written, failures reach all ranks, old checkpoints go."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.holdings import optimizer_states
from megatron_vita.checkpoint.saver import Saver
from megatron_vita.checkpoint.writer import Writer
from megatron_vita.errors import CheckpointError
from megatron_vita.parallel.groups import destroy_groups
from tests.checkpoint.tiny import Trainer, stage, state
from tests.ranks import run_ranks


def save(saver: Saver, trainer: Trainer, iteration: int) -> None:
    run = state(trainer.stage, iteration)
    saver.save(trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)


def _training_goes_on(root: str, bf16: bool) -> None:
    trainer, go, write = Trainer(stage(bf16=bf16)), threading.Event(), Writer.write_data
    trainer.step()
    with Saver(f"{root}/plain", asynchronous=False) as plain:
        save(plain, trainer, 1)

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return write(*arguments)

    Writer.write_data = late  # type: ignore[method-assign]
    with Saver(f"{root}/background") as saver:
        save(saver, trainer, 1)
        norms = [trainer.step() for _ in range(2)]
        saver.poll()  # does not wait
        assert checkpoint.latest(Path(root) / "background") is None
        go.set()
        assert saver.wait() == Path(f"{root}/background/iter_0000001")
        save(saver, trainer, 3)  # into the same memory
    Writer.write_data = write  # type: ignore[method-assign]
    destroy_groups()
    again = Trainer(stage(bf16=bf16, seed=9))
    checkpoint.load_training(f"{root}/background/iter_0000001", again.models, again.optimizer, again.scheduler)
    assert [again.step() for _ in range(2)] == norms
    with Saver(f"{root}/plain", asynchronous=False) as plain:
        save(plain, again, 3)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_save_in_the_background_is_what_save_saw_bit_for_bit(tmp_path: Path, bf16: bool) -> None:
    run_ranks(2, _training_goes_on, str(tmp_path), bf16)
    for step in ("iter_0000001", "iter_0000003"):
        plain, background = (
            {path.name: path.read_bytes() for path in (tmp_path / name / step).iterdir()}
            for name in ("plain", "background")
        )
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.json"} < set(plain)
        if step == "iter_0000003":  # whose run has another seed
            plain["run.json"] = plain["integrity.json"] = background["run.json"] = background["integrity.json"] = b""
        assert plain == background


def _until_it_fails(saver: Saver, trainer: Trainer, how: str) -> None:
    save(saver, trainer, 2)
    assert how != "plain"
    if how == "wait":
        saver.wait()
    elif how == "save":
        save(saver, trainer, 3)
    while how == "poll":
        saver.poll()


def _one_disk_is_full(root: str, how: str, rank: int) -> None:
    trainer, sync = Trainer(stage()), os.fsync

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Saver(root, asynchronous=how != "plain") as saver:
        save(saver, trainer, 1)
        saver.wait()
        if dist.get_rank() == rank:
            os.fsync = full
        message = rf"__{rank}_0\.distcp: could not be written \(No space left on device\)"
        with pytest.raises(CheckpointError, match=message):
            _until_it_fails(saver, trainer, how)
        os.fsync = sync
        dist.barrier()
        assert sorted(os.listdir(root)) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        dist.barrier()
        save(saver, trainer, 4)
    assert checkpoint.latest(Path(root)) == Path(root) / "iter_0000004"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rank"), [("plain", 1), ("wait", 0), ("wait", 1), ("poll", 1), ("save", 0)])
def test_a_full_disk_of_one_rank_is_raised_on_all(tmp_path: Path, how: str, rank: int) -> None:
    run_ranks(2, _one_disk_is_full, str(tmp_path), how, rank)


def _save_and_leave(root: str, trainer: Trainer, step: int, error: BaseException | None = None, **how: Any) -> None:
    with Saver(root, **how) as saver:
        save(saver, trainer, step)
        if error is not None:
            raise error


def _not_finite(root: str, asynchronous: bool) -> None:
    trainer = Trainer(stage())
    trainer.step()
    _save_and_leave(root, trainer, 1, asynchronous=asynchronous)
    if dist.get_rank() == 1:
        next(optimizer_states(trainer.optimizer)).tensors["exp_avg_sq"][-1] = float("nan")
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.exp_avg_sq\..* holds values that are not finite"):
        _save_and_leave(root, trainer, 2, asynchronous=asynchronous)
    dist.barrier()
    assert [step.name for step in folders.steps(Path(root))] == ["iter_0000001"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_moment_that_is_not_finite_is_named_on_all_ranks_and_never_published(
    tmp_path: Path, asynchronous: bool
) -> None:
    run_ranks(2, _not_finite, str(tmp_path), asynchronous)


def _old_ones_go(root: str) -> None:
    trainer = Trainer(stage())
    with Saver(root, keep_last=2, keep_every=3) as saver:
        for step in range(1, 8):
            save(saver, trainer, step)
            assert len(folders.steps(Path(root))) <= 4
    assert [step.name[-1] for step in folders.steps(Path(root))] == ["7", "6", "3"]


def test_old_checkpoints_go_and_leaving_waits_for_the_last(tmp_path: Path) -> None:
    run_ranks(1, _old_ones_go, str(tmp_path))


def _leave_with_an_error(root: str) -> None:
    trainer = Trainer(stage())
    with pytest.raises(KeyboardInterrupt):
        _save_and_leave(root, trainer, 1, KeyboardInterrupt())
    assert checkpoint.latest(Path(root)) is not None

    def broken(*_: object) -> None:
        raise CheckpointError("a disk that fails")

    Writer.write_data = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(RuntimeError, match="what came first"):
        _save_and_leave(root, trainer, 2, RuntimeError("what came first"))
    with pytest.raises(CheckpointError, match="a disk that fails"):
        _save_and_leave(root, trainer, 3)
    assert not list(Path(root).glob(".writing-*"))


def test_leaving_with_an_error_waits_too_and_hides_it_not(tmp_path: Path) -> None:
    run_ranks(1, _leave_with_an_error, str(tmp_path))
