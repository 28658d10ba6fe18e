"""Reading that fails, and values that no checkpoint may hold: refused on all ranks, by name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.errors import CheckpointError, DamagedError
from tests.faults.calls import Fault, watching
from tests.faults.disturbed import HANG_S, Outcome, chosen, read_outcomes, write_outcomes
from tests.faults.steps import FIRST, SECOND, World, contents
from tests.ranks import run_ranks


def failing_reads(world: World, few: int | None, *, victim: int) -> list[Outcome]:
    """Make calls fail by which one rank reads a checkpoint: an error names the path on all ranks. A disk's error is
    damage; a lack of descriptors is none, and no run may set the checkpoint aside for it.

    Args:
        few: as `chosen` takes it.
    """
    target = world.folder / "reads.txt"
    target.write_text("")
    try:
        run_ranks(world.size, _fail_reads, world, target, few, victim, timeout_s=60 * HANG_S)
    except AssertionError as error:  # one rank failed alone, and the others went on
        return [*read_outcomes(target), Outcome(f"reading fails on rank {victim}", (str(error),))]
    return read_outcomes(target)


def _fail_reads(world: World, target: Path, few: int | None, victim: int) -> None:
    trainer, rank, root = world.trainer(), dist.get_rank(), world.template

    def load(fault: Fault | None) -> tuple[str, list[str]]:
        trainer.scheduler.num_steps = 0
        ended = ""
        with watching(root, fault if rank == victim else None, reads=True) as calls:
            try:
                checkpoint.load_training(root, trainer.models, trainer.optimizer, trainer.scheduler)
            except CheckpointError as error:
                ended = f"{'damaged: ' if isinstance(error, DamagedError) else ''}{error}"
            except Exception as error:
                ended = f"bare {error!r}"
        return ended, [f"{name} {path}" for name, path in calls.made]

    def exchanged(value: object) -> list[Any]:
        values: list[Any] = [None] * world.size
        dist.all_gather_object(values, value)
        return values

    calls = exchanged(load(None)[1])[victim]
    for at in chosen(calls, few):
        for error in (errno.EIO, errno.EMFILE):
            messages = exchanged(load(Fault(at, error))[0])
            unsafe = [one for one in messages if str(root) not in one or os.strerror(error) not in one]
            words = ("bare ", "damaged: ") if error == errno.EMFILE else "bare "
            unsafe += [one for one in messages if one.startswith(words)]
            if rank == 0:
                case = f"{calls[at - 1]} fails on rank {victim}: {messages[0]}"
                write_outcomes(target, [Outcome(case, tuple(unsafe))])
    # and what was loaded in part is whole again
    assert load(None)[0] == ""
    world.save(trainer, world.folder / f"reads_{victim}", FIRST)
    if rank == 0:
        same = contents(world.folder / f"reads_{victim}" / f"iter_{FIRST:07d}") == world.first
        write_outcomes(target, [Outcome("loaded again", () if same else ("other values",))])


def not_finite(world: World, *, asynchronous: bool) -> list[Outcome]:
    """A value of one rank that is not finite: the save of it is refused on all ranks, and names the tensor."""
    target = world.folder / "not_finite.txt"
    target.unlink(missing_ok=True)
    run_ranks(world.size, _not_finite, world, target, asynchronous, timeout_s=10 * HANG_S)
    return read_outcomes(target)


def _not_finite(world: World, target: Path, asynchronous: bool) -> None:
    trainer, rank = world.at_second(), dist.get_rank()
    (adam,) = (one.optimizer for one in trainer.optimizer.chained_optimizers)
    moments = next(state for state in adam.state.values() if state["exp_avg"].numel())
    places = {
        "a weight": next(trainer.models[0].parameters()).data,
        "exp_avg": moments["exp_avg"],
        "exp_avg_sq": moments["exp_avg_sq"],
    }
    root = world.folder / f"not_finite_{asynchronous}"
    for where, tensor in places.items():
        for value in (float("nan"), float("inf"), float("-inf")):
            if rank == 0:
                world.fresh_root(root.name)
            dist.barrier()
            before = tensor.reshape(-1)[-1].item()
            if rank == world.size - 1 or where == "a weight":  # replicas of a weight are equal
                tensor.reshape(-1)[-1] = value
            ended = ""
            try:
                world.save(trainer, root, SECOND, asynchronous=asynchronous)
            except CheckpointError as error:
                ended = str(error)
            tensor.reshape(-1)[-1] = before
            every: list[str] = [""] * world.size
            dist.all_gather_object(every, ended)
            if rank == 0:
                unsafe = world.problems(root, published=False)
                unsafe += [
                    f"names no tensor: {one}" for one in every if "not finite" not in one or "_model." not in one
                ]
                if where != "a weight":
                    unsafe += [f"names another tensor: {one}" for one in every if where not in one]
                write_outcomes(target, [Outcome(f"{value} in {where}", tuple(unsafe))])
            dist.barrier()
    world.save(trainer, root, SECOND)
    if rank == 0:
        write_outcomes(target, [Outcome("saved again", tuple(world.tidy(root)))])
