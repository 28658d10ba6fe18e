"""An import whose files are changed, cut or lost: export refuses them by name. And conversions that are struck."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_vita.checkpoint.folder import HINT_FILE
from megatron_vita.convert import cli
from megatron_vita.convert.exporter import export
from megatron_vita.convert.importer import import_model
from megatron_vita.errors import DamagedError, VitaError
from tests.convert import publishers
from tests.faults.calls import KILL, Fault, watching
from tests.faults.damage import TENSORS, outcomes, verified
from tests.faults.disturbed import Outcome, chosen
from tests.faults.steps import files
from tests.ranks import run_ranks


def of_import(root: Path, flips: int) -> list[Outcome]:
    """A checkpoint as an import writes it, exported, and verified by the command line."""
    publishers.write_internvl(root / "hf")
    folder = import_model(root / "hf", root / "ckpt")

    def exported(path: Path) -> object:
        shutil.rmtree(root / "out", ignore_errors=True)
        with contextlib.redirect_stderr(io.StringIO()):
            export(path, root / "out", "internvl")
        return files(root / "out")

    readers = {"export": exported, "verify": verified, "convert_ckpt.py verify": _by_command}
    read_by_export = (*TENSORS, "conversion.json", "tokenizer/")
    must = {"export": read_by_export, "verify": ("",), "convert_ckpt.py verify": ("",)}
    return outcomes(folder, readers, must, flips)


def _by_command(folder: Path) -> object:
    """`convert_ckpt.py verify CKPT`: what it prints as its error is raised."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = cli.main(["verify", str(folder)])
    if status:
        raise DamagedError(said.getvalue())
    return status


Act = Callable[[Path, bool], object]
"""Converts something into a folder, over what is there or not."""


def struck(root: Path, act: Act, few: int | None) -> list[Outcome]:
    """Strike a conversion at calls that change its output: kill it, let a call fail, let it find the disk full.

    Afterwards the output is whole or does not exist, an error names path and reason, and the conversion given again has
    the output of an undisturbed one, with nothing beside it.
    """
    root.mkdir()  # so that every conversion makes as many folders
    good, counted, ended = root / "good" / "out", root / "counted.txt", root / "ended.txt"
    run_ranks(1, _watched, act, good, False, None, counted, ended)
    right, calls = files(good.parent), counted.read_text().splitlines()
    found = []
    for at in chosen(calls, few):
        for fault in (Fault(at), Fault(at, errno.EIO), Fault(at, errno.ENOSPC, lasting=True)):
            output = root / f"{at}_{fault.error}" / "out"
            ended.unlink(missing_ok=True)
            unsafe = []
            try:
                run_ranks(1, _watched, act, output, False, fault, counted, ended)
            except AssertionError as error:
                if fault.error != KILL:
                    unsafe.append(str(error))
            if fault.error == KILL:
                unsafe += ["nobody was killed"] if ended.exists() else []
            elif (said := ended.read_text()) and (
                str(output.parent) not in said or os.strerror(fault.error) not in said
            ):
                unsafe.append(f"neither path nor reason: {said}")
            there = files(output.parent) if output.parent.exists() else {}
            # whole, but for the hint, it is there, and the next must be told to write over it
            whole = all(there.get(name) == right[name] for name in right if not name.endswith(HINT_FILE))
            try:
                run_ranks(1, _watched, act, output, whole, None, counted, ended)
            except AssertionError as error:
                unsafe.append(f"given again: {error}")
            there = files(output.parent)
            unsafe += [f"differs: {name}" for name in right if there.get(name) != right[name]]
            unsafe += [f"left behind: {name}" for name in there.keys() - right.keys()]
            found.append(Outcome(f"{fault} {calls[at - 1]}", tuple(unsafe)))
            shutil.rmtree(output.parent)
    return found


def _watched(act: Act, output: Path, over: bool, fault: Fault | None, counted: Path, ended: Path) -> None:
    with watching(output.parent, fault) as calls:
        said = ""
        try:
            act(output, over)
        except (VitaError, OSError) as error:  # the command line says either in one line
            said = str(error)
            if fault is None:
                raise
    counted.write_text("".join(f"{name} {path}\n" for name, path in calls.made))
    ended.write_text(said)


def struck_import(root: Path, few: int | None) -> list[Outcome]:
    """Imports of a model."""
    publishers.write_internvl(root / "hf")
    return struck(root / "import", partial(_import, root / "hf"), few)


def struck_export(root: Path, few: int | None) -> list[Outcome]:
    """Exports of a model."""
    publishers.write_internvl(root / "hf")
    folder = import_model(root / "hf", root / "ckpt")
    return struck(root / "export", partial(_export, folder), few)


def _import(source: Path, output: Path, over: bool) -> None:
    import_model(source, output, overwrite=over)


def _export(folder: Path, output: Path, over: bool) -> None:
    export(folder, output, "internvl", overwrite=over)
