"""Files of an import that are changed, cut or lost: export refuses them by name."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from megatron_vita.convert import cli
from megatron_vita.convert.exporter import export
from megatron_vita.convert.importer import import_model
from megatron_vita.errors import DamagedError
from tests.convert import publishers
from tests.faults.damage import TENSORS, outcomes, verified
from tests.faults.disturbed import Outcome
from tests.faults.steps import files


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
