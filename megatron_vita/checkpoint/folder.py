"""Folders of checkpoints: names, which one is the newest, and how one appears all at once or not at all."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, Integrity
from megatron_vita.errors import CheckpointError

log = logging.getLogger(__name__)

HINT_FILE = "latest_checkpointed_iteration.txt"
"""Megatron's own name. Only a hint: what counts is a folder with a valid integrity.json."""

TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Copied into a checkpoint. A named list, because tokenizer_model may be a whole model's folder with its weights."""

_STEP = re.compile(r"iter_(\d{7,})")
_STAGING = ".writing-"
_REPLACED = ".replaced-"


def step_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of one iteration lies, e.g. DIR/iter_0000100."""
    return root / f"iter_{iteration:07d}"


def latest(root: Path) -> Path | None:
    """The newest finished checkpoint below `root`, if any. Damaged ones are passed over with a warning."""
    steps = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match:
            steps.append((int(match[1]), path))
    for _, path in sorted(steps, reverse=True):
        try:
            Integrity.read(path)
        except CheckpointError as error:
            log.warning("passed over %s", error)
            continue
        return path
    return None


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one below it.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if _STEP.fullmatch(path.name) or (path / INTEGRITY_FILE).is_file():
        Integrity.read(path)
        return path
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: holds no finished checkpoint (no iter_* folder with a valid {INTEGRITY_FILE}).")
    return found


def start_staging(root: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint in. What a killed save left behind is deleted first. Call on one rank."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.iterdir():
            if old.name.startswith((_STAGING, _REPLACED)):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        staging = staging_folder(root, iteration)
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"{root}: cannot write a checkpoint here ({error}). Choose another folder.") from None
    return staging


def staging_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of one iteration is written before it is published; the same on every rank."""
    return root / (_STAGING + step_folder(root, iteration).name)


def publish(root: Path, iteration: int) -> Path:
    """Give a completely written staging folder its name, and point the hint at it. Call on one rank."""
    staging, final = staging_folder(root, iteration), step_folder(root, iteration)
    _sync(staging)
    if final.exists():
        replaced = root / (_REPLACED + final.name)
        os.replace(final, replaced)
        os.replace(staging, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(staging, final)
    hint = root / (HINT_FILE + ".new")
    hint.write_text(f"{iteration}\n", encoding="utf-8")
    os.replace(hint, root / HINT_FILE)
    _sync(root)
    return final


def discard_staging(root: Path, iteration: int) -> None:
    """Delete what a failed save has written."""
    shutil.rmtree(staging_folder(root, iteration), ignore_errors=True)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer's files into a checkpoint, so that it can be used without the folder it was trained with."""
    if source is None or not source.is_dir():
        return
    target = folder / TOKENIZER_FOLDER
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _sync(folder: Path) -> None:
    """Make a folder's entries durable, so that a power cut cannot leave a name without its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
