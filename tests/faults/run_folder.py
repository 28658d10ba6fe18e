"""A run's folder that another run uses, or of which a checkpoint or the ledger is damaged."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vita.errors import VitaError
from megatron_vita.training.ledger import LedgerLine
from tests.faults.damage import Damage
from tests.faults.disturbed import HANG_S, Outcome
from tests.faults.every_step import LAST, STAGE, Stop, differences, given_again, train
from tests.faults.steps import files
from tests.ranks import run_ranks


def second_runs(folder: Path, seconds: Sequence[tuple[str, int, dict[str, Any], dict[str, Any]]]) -> list[Outcome]:
    """Start other runs on the folder of one that is between two steps: each is refused and writes nothing.

    Args:
        seconds: name, ranks, layout and changed settings of each.
    """
    run_ranks(1, train, folder, "whole", {})
    context = multiprocessing.get_context("fork")
    reached, go = context.Event(), context.Event()

    def hold(line: LedgerLine) -> None:
        if line.iteration == 2:
            reached.set()
            assert go.wait(HANG_S * (1 + len(seconds)))

    def first() -> None:
        changes = {"checkpoint": {"async_save": False}}  # so that it writes nothing while it is held
        run_ranks(1, train, folder, "used", {}, hold, changes, timeout_s=HANG_S * (2 + len(seconds)))

    holder = context.Process(target=first)
    holder.start()
    found = []
    try:
        assert reached.wait(HANG_S), "the first run takes no step"
        for name, size, parallel, changes in seconds:
            before = files(folder / "used")
            unsafe = []
            try:
                run_ranks(size, _refused, folder, "used", parallel, changes, timeout_s=HANG_S)
            except AssertionError as error:
                unsafe.append(str(error))
            changed = [name for name, digest in files(folder / "used").items() if before.get(name) != digest]
            unsafe += [f"has written {name}" for name in changed]
            found.append(Outcome(f"a second run, {name}", tuple(unsafe)))
    finally:
        go.set()
        holder.join()
    unsafe = [] if holder.exitcode == 0 else ["the first run has failed"]
    return [*found, Outcome("the first run", (*unsafe, *differences(folder, "whole", "used")))]


def _refused(folder: Path, save: str, parallel: dict[str, Any], changes: Mapping[str, dict[str, Any]]) -> None:
    try:
        train(folder, save, parallel, changes=changes)
    except VitaError as error:
        if str(folder / save) in str(error):
            return
        raise
    raise AssertionError("both runs train")


def damaged_steps(folder: Path, kinds: Sequence[str], only: Sequence[str] = ()) -> list[Outcome]:
    """Damage the newest checkpoint of a run that was stopped: given again, it goes on from the one before, to the bit.

    Args:
        kinds: of damage.
        only: beginnings of the names of files that are damaged, one at a time; none: every file.
    """
    run_ranks(1, train, folder, "whole", {})
    run_ranks(1, train, folder, "stopped", {}, Stop(LAST, "interrupt"))
    newest = f"{STAGE}/iter_{LAST - 1:07d}"
    found = []
    for name in files(folder / "stopped" / newest):
        if only and not name.startswith(tuple(only)):
            continue
        for kind in kinds:
            save = f"damaged {len(found)}"
            shutil.copytree(folder / "stopped", folder / save)
            size = (folder / save / newest / name).stat().st_size
            damage = Damage(name, kind, size // 2)
            damage.do(folder / save / newest)
            outcome = given_again(folder, "whole", save, {}, 1)
            unsafe = list(outcome.unsafe)
            if not (folder / save / f"{newest}.damaged").is_dir():
                unsafe.append("the damaged step is not kept")
            if not list((folder / save / STAGE).glob("ledger.after_*.jsonl")):
                unsafe.append("the ledger's later lines are not kept")
            found.append(Outcome(f"the newest step, {damage}", tuple(unsafe)))
            shutil.rmtree(folder / save)
    return found


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _without_second(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([lines[0], *lines[2:]])


LEDGERS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": _cut,
    "without its second line": _without_second,
    "a digit changed": lambda content: content.replace(b'"iteration": 2', b'"iteration": 7', 1),
    "a byte that is no text": lambda content: b"\xff" + content[1:],
    "a broken line": lambda content: content.replace(b'"loss"', b'"loss', 1),
    "lines twice": lambda content: content + content,
    "rubbish behind": lambda content: content + b"rubbish\n",
    "not one line's end": lambda content: content.replace(b"\n", b" "),
}
"""What becomes of a ledger, by name."""


def damaged_ledgers(folder: Path, names: Sequence[str]) -> list[Outcome]:
    """Damage the ledger of a run that was stopped: given again, the run says so and ends with the same weights."""
    run_ranks(1, train, folder, "whole", {})
    run_ranks(1, train, folder, "stopped", {}, Stop(LAST, "interrupt"))
    found = []
    for name in names:
        save = f"ledger {name}"
        shutil.copytree(folder / "stopped", folder / save)
        path = folder / save / STAGE / "ledger.jsonl"
        content = path.read_bytes()
        changed = LEDGERS[name](content)
        assert changed != content
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        said = folder / "said.log"
        said.unlink(missing_ok=True)
        unsafe = []
        try:
            run_ranks(1, _train_logged, folder, save, said)
            # lines that were lost stay lost; all else is as ever
            unsafe += [one for one in differences(folder, "whole", save) if "ledger" not in one and "step " not in one]
            if "ledger.jsonl" not in said.read_text():
                unsafe.append("nothing was said")
        except AssertionError as error:
            unsafe.append(str(error))
        found.append(Outcome(f"a ledger, {name}", tuple(unsafe)))
    return found


def _train_logged(folder: Path, save: str, said: Path) -> None:
    """Train with errors of the log in a file."""
    handler = logging.FileHandler(said)
    handler.setLevel(logging.ERROR)
    logging.getLogger("megatron_vita").addHandler(handler)
    train(folder, save, {})
