"""A save in the background holds the step it was asked for, whatever training does meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.checkpoint import folder as folders
from tests.faults.disturbed import HANG_S, Outcome
from tests.faults.steps import SECOND, World, contents
from tests.ranks import run_ranks


def beside(world: World) -> Outcome:
    """Train on while the second step waits to be written, then save another one at once."""
    target = world.folder / "beside.txt"
    run_ranks(world.size, _beside, world, target, timeout_s=2 * HANG_S)
    return Outcome(f"steps beside a save, {world.size} ranks", tuple(target.read_text().splitlines()))


def _beside(world: World, target: Path) -> None:
    trainer, root, gate = world.at_second(), world.folder / "beside", threading.Event()
    start, later = folders.start_staging, SECOND + 2

    def held(*arguments: Any) -> Path:
        assert gate.wait(HANG_S)
        return start(*arguments)

    with checkpoint.Saver(root) as saver:
        with mock.patch.object(folders, "start_staging", held):
            world.begin(saver, trainer, SECOND)
        saver.poll()
        trainer.step()
        saver.poll()
        found = [] if checkpoint.latest(root) is None else ["was written before it was let"]
        trainer.step()
        gate.set()
        world.begin(saver, trainer, later)  # waits for the one before
        if checkpoint.latest(root) != folders.step_folder(root, SECOND):
            found.append("the second save did not wait for the first")
        last = saver.wait()
    plain = world.folder / "plain"
    world.save(trainer, plain, later)
    if dist.get_rank() == 0:
        if contents(folders.step_folder(root, SECOND)) != world.second:
            found.append("holds another step's values")
        if last != folders.step_folder(root, later) or contents(last) != contents(folders.step_folder(plain, later)):
            found.append("the second save holds other values")
        target.write_text("".join(f"{one}\n" for one in found))
