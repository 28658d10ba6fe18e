"""Folders of checkpoints: names, which one is the newest, and how one appears all at once or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, Integrity, PieceDigests, write_integrity
from megatron_vita.checkpoint.state import RUN_FILE, RunState
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import free_name, no_room, readable_size, sync, write_atomic

log = logging.getLogger(__name__)

HINT_FILE = "latest_checkpointed_iteration.txt"
"""Megatron's own name. Only a hint: what counts is a folder with a valid integrity.json."""

TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Copied into a checkpoint. A named list, because tokenizer_model may be a whole model's folder with its weights."""
GENERATION_FILES = ("generation_config.json", "token_ids.json")
"""Copied with them: what ends a text and how words are drawn (convert/generation.py)."""
CHAT_TEMPLATES = "chat_templates"
"""Folder of a tokenizer's further chat templates, each a file."""

_STEP = re.compile(r"iter_(\d{7,})")
_STAGING = ".writing-"
_REPLACED = ".replaced-"
DELETING = ".deleting-"


def step_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of one iteration lies, e.g. DIR/iter_0000100."""
    return root / f"iter_{iteration:07d}"


def finished(root: Path) -> list[Path]:
    """The steps below `root` that have been written to their end, newest first. Whether they are intact is not read."""
    return [path for path in steps(root) if (path / INTEGRITY_FILE).is_file()]


def latest(root: Path) -> Path | None:
    """The newest intact checkpoint below `root`, if any: where a run goes on, which then makes anew what was lost.
    Damaged ones are passed over with a warning. Whoever only reads wants `resolve`."""
    for path in steps(root):
        try:
            Integrity.read(path)
        except CheckpointError as error:
            log.warning("passed over %s", error)
            continue
        return path
    return None


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest finished one below it.

    Raises:
        CheckpointError: neither, or that one is damaged: weights of an older step are taken only when it is named.
    """
    path = Path(path)
    if _STEP.fullmatch(path.name) or (path / INTEGRITY_FILE).is_file():
        Integrity.read(path)
        return path
    found = finished(path)
    if not found and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: is a Hugging Face folder. Make a checkpoint of it: tools/convert_ckpt.py import."
        )
    if not found:
        raise CheckpointError(f"{path}: holds no finished checkpoint (no iter_* folder with a valid {INTEGRITY_FILE}).")
    try:
        Integrity.read(found[0])
    except CheckpointError as error:
        older = next(filter(_intact, found[1:]), None)
        remedy = f" The newest intact one is {older}; name it to use it." if older else ""
        raise type(error)(f"{error}{remedy}") from None
    return found[0]


def steps(root: Path) -> list[Path]:
    """Folders named like steps, newest first."""
    named = [(int(match[1]), path) for path in _entries(root) if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def set_aside(step: Path) -> Path:
    """Rename a damaged step, e.g. to iter_0000100.damaged, so that it is a step no more; nothing of it is deleted.

    Returns:
        The new name: the first that is free.
    """
    aside = free_name(step.with_name(step.name + ".damaged"))
    os.replace(step, aside)
    sync(step.parent)
    return aside


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _intact(step: Path) -> bool:
    try:
        Integrity.read(step)
    except CheckpointError:
        return False
    return True


def start_staging(root: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint in. What a killed process left behind is deleted first. Call on one rank.

    Raises:
        CheckpointError: nothing can be written there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for replaced in root.glob(_REPLACED + "iter_*"):
            restore(root / replaced.name.removeprefix(_REPLACED))
        for old in root.iterdir():
            if old.name.startswith((_STAGING, _REPLACED, DELETING)):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        staging = staging_folder(root, iteration)
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"{root}: cannot write a checkpoint here ({error}). Choose another folder.") from None
    return staging


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if the block fails, those that nobody has put anything into go again.

    Raises:
        ConfigError: it cannot be made, or what is done there ends in an OSError; CheckpointError for want of room.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            for one in new:
                one.rmdir()
        if isinstance(error, OSError):
            kind = CheckpointError if no_room(error) else ConfigError
            raise kind(f"{folder}: cannot be written here ({error}). Make room, or choose another --output.") from None
        raise


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it is to be written, or where that folder will be made.
        needed: bytes in all.

    Raises:
        CheckpointError: with how much is missing.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: has {readable_size(free)} free, {readable_size(needed)} are needed. Nothing was written. Make "
            "room, or choose another folder."
        )


def write_files(staging: Path, state: RunState, tokenizer: Path | None, pieces: PieceDigests) -> None:
    """What lies beside the tensors of a checkpoint, and, last of all, its integrity.json."""
    (staging / RUN_FILE).write_text(state.to_json(), encoding="utf-8")
    copy_tokenizer(tokenizer, staging)
    write_integrity(staging, pieces)


def staging_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of one iteration is written before it is published; the same on every rank."""
    return root / (_STAGING + step_folder(root, iteration).name)


def publish(root: Path, iteration: int) -> Path:
    """Give a completely written staging folder its name, and point the hint at it. Call on one rank.

    Raises:
        OSError: it has not got its name.
        CheckpointError: it has, and the disk gave an error then.
    """
    staging, final = staging_folder(root, iteration), step_folder(root, iteration)
    take_place(staging, final)
    try:
        sync(root)
    except OSError as error:
        raise CheckpointError(
            f"{final}: is complete, but the disk may lose its name ({error.strerror}). Look after the disk."
        ) from None
    try:
        write_atomic(root / HINT_FILE, f"{iteration}\n")
    except OSError as error:  # the step is whole, and found without it
        log.warning("%s: could not be written (%s)", root / HINT_FILE, error)
    return final


def replaced_folder(final: Path) -> Path:
    """Where a folder lies while another one takes its place."""
    return final.parent / (_REPLACED + final.name)


def take_place(staging: Path, final: Path) -> None:
    """Give a complete folder its name. What has the name is moved away, and deleted when the new one is there: at no
    moment is there neither. A process killed between the two renames leaves the old one for `restore`.

    Raises:
        OSError: a rename failed; then the old folder has its name again.
    """
    replaced = replaced_folder(final)
    if _entries(final):
        if replaced.exists():
            shutil.rmtree(replaced)
        os.replace(final, replaced)
    try:
        os.replace(staging, final)
    except OSError:
        restore(final)
        raise
    forget_replaced(final)


def forget_replaced(final: Path) -> None:
    """Delete what a published folder has replaced."""
    replaced = replaced_folder(final)
    if replaced.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)


def restore(final: Path) -> None:
    """Give a folder its name back that a killed `take_place` has moved away."""
    replaced = replaced_folder(final)
    if replaced.is_dir() and not _entries(final):
        os.replace(replaced, final)


def discard_staging(root: Path, iteration: int) -> None:
    """Delete what a failed save has written."""
    shutil.rmtree(staging_folder(root, iteration), ignore_errors=True)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer's files into a checkpoint, so that it can be used without those that it was trained with.

    Args:
        source: a folder, or a single file.
        folder: the checkpoint.
    """
    if source is not None and source.is_dir():
        copy_tokenizer_files(source, folder / TOKENIZER_FOLDER)
    elif source is not None and source.is_file():
        (folder / TOKENIZER_FOLDER).mkdir()
        name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(source, folder / TOKENIZER_FOLDER / name)


def copy_tokenizer_files(source: Path, target: Path, *, generation: bool = True) -> None:
    """Copy what belongs to a tokenizer out of a folder that may hold a whole model.

    Args:
        source: the folder.
        target: where to; made if it does not exist.
        generation: copy GENERATION_FILES too.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, *(GENERATION_FILES if generation else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for path in sorted((source / CHAT_TEMPLATES).glob("*.jinja")):
        (target / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / CHAT_TEMPLATES / path.name)
