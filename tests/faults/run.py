"""All faults in their long form: `make faults` (python -m tests.faults.run [--short] [KIND ...]).

Prints what was tried, how often, and how often something unsafe came of it; exit status 1 if anything did.
"""

from __future__ import annotations

import argparse
import errno
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_vita.config import ParallelConfig
from tests.faults import damage, every_step, imported, layouts, run_folder
from tests.faults.background import beside
from tests.faults.calls import Fault
from tests.faults.disturbed import Outcome, Way, chosen, count_calls, failing, killed, order
from tests.faults.refused import failing_reads, not_finite
from tests.faults.steps import World
from tests.training.runs import make_shards

Kind = Callable[[Path, bool], list[Outcome]]
"""Tries one kind of fault in a folder; in its short form if so told."""

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


PLAIN, BACKGROUND = Way(), Way(asynchronous=True)
ONCE_MORE, KEEP_ONE = Way(replace=True), Way(asynchronous=True, keep_last=1)


def _killed(folder: Path, short: bool, *, way: Way, few: int, size: int = 1, victim: int = 0) -> list[Outcome]:
    world = World(folder, size)
    places = chosen(count_calls(world, way, victim=victim), few if short else None)
    return [killed(world, at, way, victim=victim) for at in places]


def _failing(folder: Path, short: bool, *, way: Way, victim: int, few: int) -> list[Outcome]:
    world = World(folder, 2, TP2)
    calls = count_calls(world, way, victim=victim)
    places = chosen(calls, few if short else None)
    faults = [Fault(at, errno.EIO) for at in places] + [Fault(at, errno.ENOSPC, lasting=True) for at in places]
    if not short:
        faults += [Fault(at, errno.ENOSPC) for at in chosen(calls, 40)]
    return failing(world, faults, way, victim=victim)


def _failing_reads(folder: Path, short: bool) -> list[Outcome]:
    world = World(folder, 2, TP2)
    return [one for victim in (0, 1) for one in failing_reads(world, 2 if short else 100, victim=victim)]


def _order(folder: Path, short: bool) -> list[Outcome]:
    return [order(World(folder / str(size), size), asynchronous=way) for size in (1, 2) for way in (False, True)]


def _beside(folder: Path, short: bool) -> list[Outcome]:
    return [beside(World(folder / str(size), size)) for size in ((1,) if short else (1, 2))]


def _damaged_training(folder: Path, short: bool) -> list[Outcome]:
    return damage.of_training(World(folder, 1), 3 if short else 60)


def _damaged_import(folder: Path, short: bool) -> list[Outcome]:
    return imported.of_import(folder, 3 if short else 100)


def _layouts(folder: Path, short: bool, *, bf16: bool) -> list[Outcome]:
    every = list(layouts.LAYOUTS)
    if short:
        every = ["dp2", "tp2 sp"] if bf16 else ["pp2 vpp2 dp2", "tp2 cp2"]
    return layouts.pairs(folder, every, every, bf16=bf16)


def _every_step(folder: Path, short: bool, *, way: str) -> list[Outcome]:
    make_shards(folder)
    cases = [("one", {}, 1), ("tp2", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2)]
    cases += [("pp2", {"pipeline_model_parallel_size": 2}, 2), ("cp2", {"context_parallel_size": 2}, 2), ("dp2", {}, 2)]
    stops = [2] if short else range(1, every_step.LAST)
    return [
        outcome
        for name, parallel, size in (cases[:1] if short else cases)
        for outcome in every_step.stopped(folder, name, parallel, size, stops=stops, way=way)
    ]


def _struck(folder: Path, short: bool, *, error: int) -> list[Outcome]:
    make_shards(folder)
    found = every_step.struck(folder, "one", {}, 1, count=2 if short else 150, error=error)
    return found if short else found + every_step.struck(folder, "dp2", {}, 2, count=40, error=error)


def _second_runs(folder: Path, short: bool) -> list[Outcome]:
    make_shards(folder)
    seconds = [("the same", 1, {}, {}), ("another rate", 1, {}, {"optimizer": {"lr": 2e-3}})]
    seconds += [] if short else [("two ranks", 2, {}, {}), ("another layout", 2, {"tensor_model_parallel_size": 2}, {})]
    return run_folder.second_runs(folder, seconds)


def _damaged_steps(folder: Path, short: bool) -> list[Outcome]:
    make_shards(folder)
    if short:
        return run_folder.damaged_steps(folder, ["flip"], ["__0_0", "run.json"])
    return run_folder.damaged_steps(folder, ["flip", "cut", "missing"])


def _damaged_ledgers(folder: Path, short: bool) -> list[Outcome]:
    make_shards(folder)
    names = list(run_folder.LEDGERS)
    return run_folder.damaged_ledgers(folder, names[3:4] if short else names)


def _not_finite(folder: Path, short: bool) -> list[Outcome]:
    found = not_finite(World(folder / "plain", 2), asynchronous=False)
    return found + ([] if short else not_finite(World(folder / "background", 2), asynchronous=True))


OF_SAVES: dict[str, Kind] = {
    "order": _order,
    "a step while a save is written": _beside,
    "kill one rank": partial(_killed, way=PLAIN, few=2),
    "kill one rank, asynchronous": partial(_killed, way=BACKGROUND, few=2),
    "kill one rank that saves a step once more": partial(_killed, way=ONCE_MORE, few=2),
    "kill one rank that deletes a step": partial(_killed, way=KEEP_ONE, few=2),
    "kill rank 0 of two": partial(_killed, way=BACKGROUND, size=2, victim=0, few=1),
    "kill rank 1 of two": partial(_killed, way=BACKGROUND, size=2, victim=1, few=1),
    "errors on rank 0": partial(_failing, way=PLAIN, victim=0, few=3),
    "errors on rank 1": partial(_failing, way=PLAIN, victim=1, few=2),
    "errors on rank 0, asynchronous": partial(_failing, way=KEEP_ONE, victim=0, few=2),
    "errors on rank 1, asynchronous": partial(_failing, way=BACKGROUND, victim=1, few=1),
    "errors on rank 0 that saves a step once more": partial(_failing, way=ONCE_MORE, victim=0, few=1),
    "errors while a checkpoint is read": _failing_reads,
    "damage to a checkpoint of training": _damaged_training,
    "damage to an import": _damaged_import,
    "an import that is struck": lambda folder, short: imported.struck_import(folder, 2 if short else None),
    "an export that is struck": lambda folder, short: imported.struck_export(folder, 2 if short else None),
    "pairs of layouts": partial(_layouts, bf16=False),
    "pairs of layouts, bf16": partial(_layouts, bf16=True),
    "values that are not finite": _not_finite,
}
"""Saving and loading, by name."""
OF_RUNS: dict[str, Kind] = {
    "a run interrupted at a step": partial(_every_step, way="interrupt"),
    "a run terminated at a step": partial(_every_step, way="terminate"),
    "a run killed at a step": partial(_every_step, way="kill"),
    "a run killed at a call": partial(_struck, error=-1),
    "a run on a full disk": partial(_struck, error=errno.ENOSPC),
    "two runs on one folder": _second_runs,
    "a damaged newest step": _damaged_steps,
    "a damaged ledger": _damaged_ledgers,
}
"""Runs of training, by name."""
KINDS = OF_SAVES | OF_RUNS


def main() -> int:
    """Try the kinds that were named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--short", action="store_true", help="few cases of each, as the tests try")
    parser.add_argument("--scratch", type=Path, help="folder for a hundred megabytes")
    parser.add_argument("--cases", action="store_true", help="print every case")
    arguments = parser.parse_args()
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}")
    print(f"{'kind':40s} {'cases':>6s} {'unsafe':>6s} {'seconds':>8s}", flush=True)
    total = 0
    for kind in arguments.kinds or KINDS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            found = KINDS[kind](Path(folder), arguments.short)
        unsafe = [one for one in found if one.unsafe]
        total += len(unsafe)
        print(f"{kind:40s} {len(found):6d} {len(unsafe):6d} {time.monotonic() - began:8.1f}", flush=True)
        for one in found if arguments.cases else unsafe:
            print(f"    {one.case}", *(f"\n        {text}" for text in one.unsafe), flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
