"""A run of two steps whose checkpoints are known to the bit, for whoever disturbs the saving of the second."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from megatron_vita import checkpoint
from megatron_vita.checkpoint import folder as folders
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.config import ParallelConfig
from tests.checkpoint.tiny import Trainer, stage, state
from tests.ranks import run_ranks

FIRST, SECOND = 1, 2
Contents = dict[str, str]


def contents(folder: Path, *, plain: bool = True) -> Contents:
    """Digest of every tensor of a checkpoint, whatever layout wrote it, and of its plain values."""
    tensors = checkpoint.read_tensors(folder)
    digests = {name: _digest(tensors[name]) for name in sorted(tensors)}
    common = folder / "common.json"
    if plain and common.exists():
        digests["common.json"] = hashlib.sha256(common.read_bytes()).hexdigest()
    return digests


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()


def files(folder: Path) -> Contents:
    """Digest of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tokenizer_folder(root: Path) -> Path:
    """A folder of what a checkpoint copies along."""
    folder = root / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": "none" * 100}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


class World:
    """A prepared folder: one step saved, and what the second holds when nothing disturbs it."""

    def __init__(self, folder: Path, size: int, parallel: ParallelConfig | None = None) -> None:
        self.size, self.parallel = size, parallel or ParallelConfig()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = tokenizer_folder(folder)
        self.template = folder / "template"
        run_ranks(size, self._prepare)
        self.first = contents(folders.step_folder(self.template, FIRST))
        self.first_files = files(folders.step_folder(self.template, FIRST))
        second = folders.step_folder(folder / "second", SECOND)
        self.second = contents(second)
        self.names = set(files(second))

    def _prepare(self) -> None:
        trainer = self.trainer()
        trainer.step()
        self.save(trainer, self.template, FIRST)
        trainer.step()
        self.save(trainer, self.folder / "second", SECOND)

    def trainer(self) -> Trainer:
        """Model and optimizer in this world's layout. On every rank."""
        return Trainer(stage(self.parallel))

    def save(
        self, trainer: Trainer, root: Path, iteration: int, *, asynchronous: bool = False, keep_last: int = 0
    ) -> None:
        """Save everything, and wait until it is there."""
        with checkpoint.Saver(root, asynchronous=asynchronous, keep_last=keep_last) as saver:
            self.begin(saver, trainer, iteration)

    def begin(self, saver: checkpoint.Saver, trainer: Trainer, iteration: int) -> None:
        """Begin to save everything."""
        run = state(trainer.stage, iteration)
        what = (trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
        saver.save(*what, tokenizer=self.tokenizer)

    def at_second(self) -> Trainer:
        """A trainer that went on from the first step's checkpoint by one step."""
        trainer = self.trainer()
        checkpoint.load_training(self.template, trainer.models, trainer.optimizer, trainer.scheduler)
        trainer.step()
        return trainer

    def fresh_root(self, name: str, *, second: bool = False) -> Path:
        """A copy of the template; with the second step, if that is to be saved once more."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.template, root)
        if second:
            shutil.copytree(folders.step_folder(self.folder / "second", SECOND), folders.step_folder(root, SECOND))
        return root

    def problems(self, root: Path, *, published: bool | None = None) -> list[str]:
        """What is wrong with a folder in which saving the second step was disturbed.

        Args:
            published: whether the second step must be there; none: either is right.
        """
        found = []
        first, second = (folders.step_folder(root, number) for number in (FIRST, SECOND))
        newest = checkpoint.latest(root)
        if files(first) != self.first_files and (first.exists() or newest != second):  # the second may replace it
            found.append("the first step has changed")
        if newest not in (first, second):
            found.append(f"the newest step is {newest}")
        if published is not None and published != (newest == second):
            found.append(f"the second step is {'not ' if published else ''}there")
        if second.exists():
            found += self._whole(second, self.second)
        return found

    def _whole(self, folder: Path, expected: Contents) -> list[str]:
        try:
            Integrity.read(folder).check_all()
            if contents(folder) != expected:
                return [f"{folder.name} holds other values"]
            if set(files(folder)) != self.names:
                return [f"{folder.name} holds other files"]
        except Exception as error:
            return [f"{folder.name}: {error!r}"]
        return []

    def tidy(self, root: Path) -> list[str]:
        """What is wrong with a folder in which the second step was saved anew after a disturbance."""
        found = self.problems(root, published=True)
        rubbish = set(os.listdir(root)) - {"iter_0000001", "iter_0000002", folders.HINT_FILE}
        return [*found, *(f"left behind: {name}" for name in sorted(rubbish))]
