"""Saves that are killed, or whose calls fail: what is there afterwards is one step or the other, to the bit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.errors import CheckpointError
from tests.checkpoint.tiny import Trainer
from tests.faults.calls import KILL, Fault, watching
from tests.faults.steps import FIRST, SECOND, World
from tests.ranks import run_ranks

HANG_S = 60
"""A rank that has not ended by then hangs. (The issue says 30 s on an idle machine.)"""


@dataclass(frozen=True)
class Outcome:
    """One case."""

    case: str
    unsafe: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """A way to save the second step."""

    asynchronous: bool = False
    replace: bool = False
    """It is there already, and is saved once more."""
    keep_last: int = 0
    """Steps that are kept: with 1, saving the second deletes the first."""

    def save(self, world: World, trainer: Trainer, root: Path) -> None:
        """Save so."""
        world.save(trainer, root, SECOND, asynchronous=self.asynchronous, keep_last=self.keep_last)


def count_calls(world: World, way: Way, *, victim: int = 0) -> list[str]:
    """Names of the calls that an undisturbed save of the second step makes on one rank."""
    target = world.folder / "calls.txt"
    run_ranks(world.size, _count, world, target, victim, way)
    return target.read_text().splitlines()


def _count(world: World, target: Path, victim: int, way: Way) -> None:
    trainer = world.at_second()
    root = world.folder / "counted"
    if dist.get_rank() == 0:
        world.fresh_root(root.name, second=way.replace)
    dist.barrier()
    with watching(root) as calls:
        way.save(world, trainer, root)
    if dist.get_rank() == victim:
        target.write_text("".join(f"{name} {os.path.relpath(path, root)}\n" for name, path in calls.made))


def killed(world: World, at: int, way: Way, *, victim: int = 0) -> Outcome:
    """Kill one rank at a call of its save; then save the same step again in new processes."""
    case = f"kill rank {victim} of {world.size} at call {at}, {way}"
    root = world.fresh_root(f"kill_{at}", second=way.replace)
    unsafe = []
    try:
        run_ranks(world.size, _save_and_die, world, root, at, victim, way, timeout_s=HANG_S)
    except AssertionError as error:
        if " hung " in str(error):
            unsafe.append(str(error))
    else:
        unsafe.append("nobody was killed")
    unsafe += world.problems(root)
    try:
        run_ranks(world.size, _save_again, world, root)
    except AssertionError as error:
        unsafe.append(f"saving again: {error}")
    unsafe += world.tidy(root)
    return Outcome(case, tuple(unsafe))


def _save_and_die(world: World, root: Path, at: int, victim: int, way: Way) -> None:
    trainer = world.at_second()
    fault = Fault(at, KILL) if dist.get_rank() == victim else None
    with watching(root, fault):
        way.save(world, trainer, root)


def _save_again(world: World, root: Path) -> None:
    trainer = world.trainer()
    found = checkpoint.latest(root)
    back = checkpoint.load_training(root, trainer.models, trainer.optimizer, trainer.scheduler)
    assert found is not None
    assert back.iteration == int(found.name.removeprefix("iter_"))
    if back.iteration == FIRST:
        trainer.step()
    world.save(trainer, root, SECOND)


def failing(world: World, faults: Sequence[Fault], way: Way, *, victim: int = 0) -> list[Outcome]:
    """Make calls of one rank's save fail, one save after the other in the same processes."""
    target = world.folder / "outcomes.txt"
    target.unlink(missing_ok=True)
    run_ranks(world.size, _fail, world, list(faults), target, victim, way, timeout_s=HANG_S + 2 * len(faults))
    outcomes = read_outcomes(target)
    assert len(outcomes) == len(faults)
    return outcomes


def _fail(world: World, faults: Iterable[Fault], target: Path, victim: int, way: Way) -> None:
    trainer, rank = world.at_second(), dist.get_rank()
    root = world.folder / f"failing_{victim}"
    for fault in faults:
        if rank == 0:
            world.fresh_root(root.name, second=way.replace)
        dist.barrier()
        ended = ""
        with watching(root, fault if rank == victim else None) as calls:
            try:
                way.save(world, trainer, root)
            except CheckpointError as error:
                ended = str(error) or "an empty message"
            except Exception as error:
                ended = f"bare {error!r}"
        every: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
        dist.all_gather_object(every, (ended, calls.struck))
        unsafe = _judge(world, root, fault, every, victim, way) if rank == 0 else []
        dist.barrier()
        world.save(trainer, root, SECOND)
        if rank == 0:
            unsafe += [f"after saving again, {one}" for one in world.tidy(root)]
            case = f"{os.strerror(fault.error)}{', lasting' if fault.lasting else ''} on rank {victim} at {fault.at}: "
            case += f"{every[victim][1]}: {every[0][0]}"
            write_outcomes(target, [Outcome(case, tuple(unsafe))])


def _judge(
    world: World, root: Path, fault: Fault, every: Sequence[tuple[str, str | None]], victim: int, way: Way
) -> list[str]:
    messages, struck = [ended for ended, _ in every], every[victim][1]
    unsafe = world.problems(root, published=None if any(messages) else True)
    if struck is None:
        unsafe.append("nothing failed")
    if len({bool(one) for one in messages}) > 1:
        unsafe.append(f"ranks end differently: {messages}")
    for one in messages:
        if one.startswith("bare "):
            unsafe.append(one)
        elif one and (str(root) not in one or os.strerror(fault.error) not in one):
            unsafe.append(f"neither path nor reason: {one}")
        if "Nothing was published" in one and (root / f"iter_{SECOND:07d}").exists() and not way.replace:
            unsafe.append(f"something was: {one}")
    return unsafe


MOST = 600
"""Further writes of a file that the long form tries of one save, at random if there are more."""


def chosen(calls: Sequence[str], few: int | None) -> list[int]:
    """Numbers of calls to strike: the first of each function and file, and further ones at random.

    Args:
        few: how many of either; none: all, or all of the first and MOST of the further ones.
    """
    seen: set[str] = set()
    firsts, further = [], []
    for number, call in enumerate(calls, 1):
        (further if call in seen else firsts).append(number)
        seen.add(call)
    if few is not None:
        firsts = [firsts[step * (len(firsts) - 1) // max(1, few - 1)] for step in range(min(few, len(firsts)))]
    return sorted({*firsts, *random.Random(len(calls)).sample(further, min(few or MOST, len(further)))})


def order(world: World, *, asynchronous: bool) -> Outcome:
    """Whether all of a step is on the disk when it gets its name."""
    target = world.folder / "late.txt"
    target.unlink(missing_ok=True)
    run_ranks(world.size, _order, world, target, asynchronous)
    case = f"order of calls, {world.size} ranks{', asynchronous' if asynchronous else ''}"
    return Outcome(case, tuple(target.read_text().splitlines()))


def _order(world: World, target: Path, asynchronous: bool) -> None:
    root = world.folder / f"order_{asynchronous}"
    trainer = world.at_second()
    with watching(root) as calls:
        world.save(trainer, root, SECOND, asynchronous=asynchronous)
    every: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, calls.made)
    if dist.get_rank() == 0:  # the others have done their part before rank 0 is told of it, and gives the step its name
        made = [call for one in every[1:] for call in one] + every[0]
        target.write_text(
            "".join(f"{path} has its name before it is on the disk\n" for path in unsynced(made, str(root)))
        )


def unsynced(calls: Sequence[tuple[str, str]], root: str) -> list[str]:
    """Files and folders of a step that gets its name before they are on the disk, so that a power cut could empty them.

    Args:
        calls: all that were made, those of rank 0 last.
        root: folder of the steps.
    """
    final = f"{root}/iter_{SECOND:07d}"
    named = next(index for index, one in enumerate(calls) if one == ("replace", final) or one == ("rename", final))
    changed: dict[str, int] = {}
    synced: dict[str, int] = {}
    for index, (name, path) in enumerate(calls):
        if name in ("fsync", "fdatasync"):
            synced[path] = index
        elif index < named:
            if name not in ("truncate", "ftruncate", "unlink", "remove", "rmdir") and path != root:
                changed[path] = index
            changed[os.path.dirname(path)] = index
    staging = [path for path in changed if path.startswith(root + "/.")]
    late = [path for path in staging if not changed[path] < synced.get(path, -1) < named]
    if synced.get(root, -1) < named:
        late.append(root)
    return late


def write_outcomes(target: Path, found: Sequence[Outcome]) -> None:
    """Hand outcomes over from a rank."""
    with target.open("a", encoding="utf-8") as file:
        for one in found:
            line = "\t".join(text.replace("\n", " ").replace("\t", " ") for text in (one.case, *one.unsafe))
            file.write(line + "\n")


def read_outcomes(target: Path) -> list[Outcome]:
    """What `write_outcomes` wrote."""
    lines = (line.split("\t") for line in target.read_text(encoding="utf-8").splitlines())
    return [Outcome(case, tuple(unsafe)) for case, *unsafe in lines]
