"""Runs that end early: by a signal to one rank, a full disk, or a loss that is not finite; and how they go on."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import yaml

from megatron_vita import checkpoint
from megatron_vita.config import to_dict
from megatron_vita.errors import CheckpointError, VitaError
from megatron_vita.training import ledger as ledgers
from megatron_vita.training import metrics, stages
from megatron_vita.training import step as steps
from megatron_vita.training.ledger import LedgerLine
from megatron_vita.training.stages import run_stages
from tests.ranks import run_ranks
from tests.training.runs import ledger, make_shards, recipe

ROOT = Path(__file__).parents[2]
STAGE: tuple[dict[str, Any], ...] = ({"name": "only", "train": {"train_iters": 6}, "checkpoint": {"save_interval": 2}},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("leaving")
    make_shards(path)
    return path


def _train(folder: Path, save: str, **options: Any) -> None:
    data = {"valid_data_path": str(folder / "shards/train")}
    run_stages(recipe(folder, save, options.pop("stages", STAGE), data=data, **options))


def _signalled(folder: Path, save: str, number: signal.Signals) -> None:
    """The last rank alone gets a signal, twice, as a launcher sends it, in step 3."""
    report, last = metrics.Progress.step, dist.get_world_size() - 1
    before = signal.getsignal(number)

    def signalled(self: metrics.Progress, line: LedgerLine) -> None:
        report(self, line)
        if line.iteration == 3 and dist.get_rank() == last:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    with mock.patch.object(metrics.Progress, "step", signalled), pytest.raises(SystemExit) as left:
        _train(folder, save)
    assert left.value.code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)], ids=["INT", "TERM", "INT of 2"]
)
def test_a_signal_to_one_rank_ends_all_after_the_same_step(folder: Path, ranks: int, number: signal.Signals) -> None:
    save = f"{number.name}_{ranks}"
    run_ranks(ranks, _signalled, folder, save, number)
    assert [line["iteration"] for line in ledger(folder, save, "only")] == [1, 2, 3]
    assert checkpoint.read_state(folder / save / "only").iteration == 2
    run_ranks(ranks, _train, folder, save)
    assert [line["iteration"] for line in ledger(folder, save, "only")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_command_ends_with_the_status_of_the_signal(folder: Path) -> None:
    run = recipe(folder, "command", ({"name": "only", "train": {"train_iters": 10**6}},))
    settings = {name: value for name, value in to_dict(run.stages[0]).items() if name != "name"}
    path = folder / "command.yaml"
    path.write_text(yaml.safe_dump({**settings, "stages": [{"name": "only"}]}))
    command = [sys.executable, str(ROOT / "pretrain_vita.py"), "--config", str(path)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with subprocess.Popen(command, cwd=ROOT, env=alone, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("attention of packed documents ") for line in lines), "the table of kernels"
        assert any(" 2/1000000 " in line for line in lines)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert "Traceback" not in rest
    assert "SIGTERM: the run ends here" in rest


def _full_at(folder: Path, save: str, target: object, name: str, when: Callable[..., bool], kind: type) -> None:
    """A write on rank 0 finds the disk full; every rank gets the error."""
    act = getattr(target, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return act(*args, **kwargs)

    with mock.patch.object(target, name, full), pytest.raises(kind, match="No space left on device") as raised:
        _train(folder, save)
    assert raised.value.exit_status == 1
    assert type(raised.value) is kind
    assert str(folder / save) in str(raised.value)


FULL: dict[str, tuple[object, str, Callable[..., bool], type]] = {
    "a line of the ledger": (ledgers.Ledger, "write", lambda ledger, line: line["iteration"] == 3, VitaError),
    "the last line": (ledgers.Ledger, "write", lambda ledger, line: line["iteration"] == 6, VitaError),
    "the first validation": (ledgers.Ledger, "write", lambda ledger, line: "lr" not in line, VitaError),
    "the ledger's sync": (ledgers, "sync_data", lambda _: True, CheckpointError),
    "the settings": (stages, "write_atomic", lambda path, _: path.name == "config.yaml", CheckpointError),
    "the lock": (Path, "mkdir", lambda path, **_: path.name.startswith("full"), CheckpointError),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", FULL)
def test_a_full_disk_is_named_on_all_ranks_and_the_run_goes_on_when_there_is_room(folder: Path, write: str) -> None:
    save = f"full_{write.replace(' ', '_')}"
    run_ranks(2, _full_at, folder, save, *FULL[write])
    run_ranks(2, _train, folder, save)
    assert [line["iteration"] for line in ledger(folder, save, "only")] == [1, 2, 3, 4, 5, 6]


def _unwritable(folder: Path, save: str, events: str) -> None:
    with pytest.raises(VitaError, match=r"logging\.tensorboard_dir=") as raised:
        _train(folder, save, logging={"tensorboard_dir": events})
    assert raised.value.exit_status == 1


@pytest.mark.slow
def test_a_folder_of_events_that_cannot_be_made_is_named_on_all_ranks(folder: Path) -> None:
    (folder / "a_file").touch()
    run_ranks(2, _unwritable, folder, "events", str(folder / "a_file/events"))


def _until_nan(folder: Path, save: str, lr: float, at: int | None, text: str) -> None:
    """Train; with the high learning rate the loss of step `at` is not a number."""
    check = steps.check_finite

    def diverging(name: str, value: float, *, iteration: int, **rest: Any) -> None:
        check(name, math.nan if iteration == at else value, iteration=iteration, **rest)

    with mock.patch.object(steps, "check_finite", diverging):
        if at is None:
            _train(folder, save, optimizer={"lr": lr, "min_lr": 1e-5})
            return
        with pytest.raises(VitaError, match=text):
            _train(folder, save, optimizer={"lr": lr, "min_lr": 1e-5})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_loss_is_not_finite_goes_on_with_a_lower_learning_rate(folder: Path, ranks: int) -> None:
    save = f"diverged_{ranks}"
    again = r"step 2: the loss is nan.*lower optimizer.lr.*starts the stage again, which has no checkpoint yet"
    run_ranks(ranks, _until_nan, folder, save, 2e-3, 2, again)
    run_ranks(ranks, _until_nan, folder, save, 2e-3, 5, r"step 5: the loss is nan.*goes on from .*iter_0000004\.")
    run_ranks(ranks, _until_nan, folder, save, 1e-3, None, "")
    lines = ledger(folder, save, "only")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    run_ranks(ranks, _until_nan, folder, f"{save}_low", 1e-3, None, "")
    low = ledger(folder, f"{save}_low", "only")
    assert [line["lr"] == other["lr"] for line, other in zip(lines, low, strict=True)] == [False] * 4 + [True] * 2
    assert checkpoint.read_state(folder / save / "only").stage.optimizer.lr == 1e-3
