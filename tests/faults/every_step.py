"""A run that is stopped at any step, or at any call that changes its folder, and given again, equals the uninterrupted
one to the bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.errors import VitaError
from megatron_vita.training import metrics
from megatron_vita.training.ledger import LedgerLine
from megatron_vita.training.stages import run_stages
from tests.faults.calls import KILL, Fault, watching
from tests.faults.disturbed import HANG_S, Outcome
from tests.faults.steps import contents
from tests.ranks import run_ranks
from tests.training.runs import ledger, recipe

STAGE = "only"
WAYS = ("interrupt", "terminate", "kill")
LAST = 4
"""Steps of a run."""


def stopped(
    folder: Path, name: str, parallel: dict[str, Any], size: int, *, stops: Iterable[int], way: str
) -> list[Outcome]:
    """Stop a run at each of `stops` and give it again.

    Args:
        folder: where tests.training.runs.make_shards has been.
        way: `interrupt` raises KeyboardInterrupt on every rank, `terminate` sends SIGTERM to the last one, `kill` kills
            all of them; each when the step's line has been written and its checkpoint has not.
    """
    whole = f"{name} whole"
    run_ranks(size, train, folder, whole, parallel)
    found = []
    for stop in stops:
        save = f"{name} {way} {stop}"
        try:
            run_ranks(size, train, folder, save, parallel, Stop(stop, way))
        except AssertionError as error:
            if way != "kill" or " hung " in str(error):
                raise
        found.append(given_again(folder, whole, save, parallel, size))
    return found


def struck(
    folder: Path, name: str, parallel: dict[str, Any], size: int, *, count: int | None, error: int = KILL
) -> list[Outcome]:
    """Strike rank 0 of a run at calls that change its folder: kill it, or let it find the disk full from then on.

    Args:
        count: calls, evenly over the whole run; none: every one.
    """
    whole = f"{name} whole"
    counted = folder / "counted.txt"
    run_ranks(size, train_watched, folder, whole, parallel, None, counted)
    total = int(counted.read_text())
    count = min(count or total, total)
    places = [1 + step * (total - 1) // max(1, count - 1) for step in range(count)]
    found = []
    for at in places:
        save = f"{name} {'killed' if error == KILL else os.strerror(error)} at call {at}"
        unsafe = []
        try:
            fault = Fault(at, error, lasting=error != KILL)
            run_ranks(size, train_watched, folder, save, parallel, fault, timeout_s=2 * HANG_S)
        except AssertionError as problem:
            if error != KILL or " hung " in str(problem):
                unsafe.append(str(problem))
        again = given_again(folder, whole, save, parallel, size)
        found.append(Outcome(save, (*unsafe, *again.unsafe)))
        shutil.rmtree(folder / save)
    return found


def train_watched(
    folder: Path, save: str, parallel: dict[str, Any], fault: Fault | None, counted: Path | None = None
) -> None:
    first = os.environ["RANK"] == "0"
    with watching(folder / save, fault if first else None) as calls:
        try:
            train(folder, save, parallel)
        except VitaError as error:
            if fault is None or str(folder / save) not in str(error) or os.strerror(fault.error) not in str(error):
                raise AssertionError("neither path nor reason") from error
    if counted is not None and first:
        counted.write_text(str(len(calls.made)))


def given_again(folder: Path, whole: str, save: str, parallel: dict[str, Any], size: int) -> Outcome:
    """Give a run's command again, and compare it with the uninterrupted one."""
    try:
        run_ranks(size, train, folder, save, parallel)
        return Outcome(save, tuple(differences(folder, whole, save)))
    except AssertionError as error:
        return Outcome(save, (f"given again: {error}",))


def differences(folder: Path, whole: str, save: str) -> list[str]:
    """In what two runs differ."""
    found = []
    one, other = ledger(folder, whole, STAGE), ledger(folder, save, STAGE)
    if [line["iteration"] for line in other] != list(range(1, len(one) + 1)):
        found.append(f"steps in the ledger: {[line['iteration'] for line in other]}")
    for a, b in zip(one, other, strict=False):
        found += [
            f"step {a['iteration']}: {key} is {b.get(key)}, not {a[key]}"
            for key in a
            if key != "seconds" and a[key] != b.get(key)
        ]
    ends = [contents(checkpoint.resolve(folder / one / STAGE)) for one in (whole, save)]
    if ends[0] != ends[1]:
        found.append("the last checkpoint holds other values")
    # what retention was deleting when the last save was struck is deleted by the next save, of which there is none
    left = sorted(name for name in os.listdir(folder / save / STAGE) if name.startswith((".writing", ".replaced")))
    return found + [f"left behind: {name}" for name in left]


def train(
    folder: Path,
    save: str,
    parallel: dict[str, Any],
    hook: Callable[[LedgerLine], None] | None = None,
    changes: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Train to the end, with a checkpoint of every step.

    Args:
        hook: called on every rank behind each step.
        changes: further settings, by section.
    """
    step = metrics.Progress.step

    def hooked(self: metrics.Progress, line: LedgerLine) -> None:
        step(self, line)
        if hook is not None:
            hook(line)

    stage = {"name": STAGE, "parallel": parallel, "data": {"reset_per_document": True}}
    sections: dict[str, Any] = {
        "train": {"train_iters": LAST, "global_batch_size": 4},
        "checkpoint": {"save_interval": 1},
        # rates of their own for layers: several parameter groups
        "optimizer": {"weight_decay": 0.1, "vision_model_lr_mult": 0.1, "vision_model_lr_decay_rate": 0.9},
    }
    for section, values in (changes or {}).items():
        sections[section].update(values)
    with mock.patch.object(metrics.Progress, "step", hooked):
        try:
            run_stages(recipe(folder, save, (stage,), **sections))
        except (KeyboardInterrupt, SystemExit):
            if hook is None:
                raise


class Stop:
    """Stops a run behind a step."""

    def __init__(self, at: int, way: str) -> None:
        self.at, self.way = at, way

    def __call__(self, line: LedgerLine) -> None:
        if line.iteration == self.at:
            if self.way == "interrupt":
                raise KeyboardInterrupt
            if self.way == "kill" or dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL if self.way == "kill" else signal.SIGTERM)
