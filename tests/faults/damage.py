"""Files of a checkpoint that are changed, cut or lost: whoever reads one refuses it by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vita import checkpoint
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, Integrity
from megatron_vita.errors import VitaError
from tests.checkpoint.tiny import Trainer
from tests.faults.disturbed import Outcome, read_outcomes, write_outcomes
from tests.faults.steps import FIRST, World, files
from tests.ranks import run_ranks

Reader = Callable[[Path], object]
"""Reads a checkpoint; returns whatever shows that what it has read is right."""


@dataclass(frozen=True)
class Damage:
    """One way in which a file is not what was written."""

    file: str
    kind: str
    """`flip`, `cut`, `grown`, `zeros` or `missing`."""
    position: int = 0
    """Of the byte that is flipped, in which the zeros begin, or before which the file ends."""
    bit: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} at {self.position}"

    def do(self, folder: Path) -> None:
        """Damage the file."""
        path = folder / self.file
        changed = bytearray(path.read_bytes())
        if self.kind == "flip":
            changed[self.position] ^= 1 << self.bit
        elif self.kind == "zeros":
            changed[self.position : self.position + 64] = bytes(len(changed[self.position : self.position + 64]))
        elif self.kind == "cut":
            del changed[self.position :]
        elif self.kind == "grown":
            changed += b"\0"
        path.unlink()
        if self.kind != "missing":
            path.write_bytes(changed)

    @contextmanager
    def done(self, folder: Path) -> Iterator[None]:
        """Damage the file for the time of the block."""
        content = (folder / self.file).read_bytes()
        self.do(folder)
        try:
            yield
        finally:
            (folder / self.file).write_bytes(content)


def damages(folder: Path, flips: int, *, seed: int = 0) -> Iterator[Damage]:
    """Every kind of damage to every file of a checkpoint.

    Args:
        flips: bytes of each file that are flipped, one at a time: the first, the last, and others at random.
    """
    chance = random.Random(seed)
    for name in files(folder):
        size = (folder / name).stat().st_size
        places = [0, size - 1, *(chance.randrange(size) for _ in range(flips - 2))] if size else []
        for place in places[:flips]:
            yield Damage(name, "flip", place, chance.randrange(8))
        last = size - 2 if name == INTEGRITY_FILE else size - 1  # the end of its line means nothing
        for place in sorted({0, size // 2, max(0, last)} - {size}):
            yield Damage(name, "cut", place)
        yield Damage(name, "grown")
        yield Damage(name, "missing")
        middle = size // 2
        if any((folder / name).read_bytes()[middle : middle + 64]):
            yield Damage(name, "zeros", middle)


def outcomes(
    folder: Path, readers: Mapping[str, Reader], must: Mapping[str, Sequence[str]], flips: int
) -> list[Outcome]:
    """Damage after damage, read by each reader: it names the file, or what it reads is what was written.

    Args:
        must: files, or folders, that a reader may not pass over.
    """
    right = {name: reader(folder) for name, reader in readers.items()}
    found = []
    for damage in damages(folder, flips):
        for name, reader in readers.items():
            unsafe = ()
            with damage.done(folder):
                try:
                    result = reader(folder)
                except VitaError as error:
                    named = folder.name if damage.kind == "missing" and damage.file == INTEGRITY_FILE else damage.file
                    if named not in str(error):
                        unsafe = (f"does not name the file: {error}",)
                except Exception as error:
                    unsafe = (f"bare {error!r}",)
                else:
                    if result != right[name]:
                        unsafe = ("another result, in silence",)
                    elif damage.kind in ("cut", "grown", "missing") or damage.file.startswith(tuple(must[name])):
                        unsafe = ("passed over",)
            found.append(Outcome(f"{name}, {damage}", unsafe))
    for name, reader in readers.items():
        assert reader(folder) == right[name], f"{name}: what was damaged must be whole again"
    return found


def verified(folder: Path) -> object:
    """What `verify CKPT` does."""
    Integrity.read(folder).check_all()
    return None


TENSORS = (".metadata", "__", "run.json", "integrity.json")
"""What nobody who loads weights passes over. (Of tensor files, `load_weights` reads the weights only.)"""


def of_training(world: World, flips: int) -> list[Outcome]:
    """A checkpoint as training writes it, loaded by one rank."""
    folder = world.template / f"iter_{FIRST:07d}"
    target = world.folder / "damaged.txt"
    target.unlink(missing_ok=True)
    run_ranks(1, _load_damaged, world, folder, flips, target, timeout_s=3600)
    return read_outcomes(target)


def _load_damaged(world: World, folder: Path, flips: int, target: Path) -> None:
    trainer = world.trainer()

    def weights() -> list[bytes]:
        return [one.detach().numpy().tobytes() for one in trainer.models[0].parameters()]

    def load_training(path: Path) -> object:
        checkpoint.load_training(path, trainer.models, trainer.optimizer, trainer.scheduler)
        return weights()

    def load_weights(path: Path) -> object:
        _forget(trainer)
        checkpoint.load_weights(path, trainer.models)
        return weights()

    readers = {"load_training": load_training, "load_weights": load_weights, "verify": verified}
    must = {
        "load_training": (*TENSORS, "common.json"),
        "load_weights": (".metadata", "run.json", "integrity.json"),
        "verify": ("",),
    }
    write_outcomes(target, outcomes(folder, readers, must, flips))


def _forget(trainer: Trainer) -> None:
    with torch.no_grad():
        for one in trainer.models[0].parameters():
            one.fill_(7)
