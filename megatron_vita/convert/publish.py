"""Atomic publication of a folder: it appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vita.checkpoint.folder import forget_replaced, restore, take_place
from megatron_vita.convert.outputs import check_export, lock_of, staging_of
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import lock_file, readable_size, sync


@contextmanager
def new_folder(
    output: Path, sources: Iterable[str | Path | None], *, overwrite: bool, size: int, durable: bool
) -> Iterator[Path]:
    """A folder to write in, that takes the place and name of `output` when the block ends without an error.

    Nothing of an older folder is left in the new one: a stale shard would be read along. What a killed process has left
    of its own is deleted.

    Args:
        output: a link is followed.
        sources: folders that are read, see check_export.
        size: bytes that will be written.
        durable: wait until the disk has everything before the folder gets its name.

    Raises:
        ConfigError: nothing can be written there, another process is just doing so, or something is there and not to
            be replaced.
        CheckpointError: no space. Nothing is published then.
    """
    sources, target = list(sources), output.resolve()
    staging, made = staging_of(target), [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock_of(target)) as held:
            if not held:
                raise ConfigError(f"{output}: another process is writing it. Wait for it, or choose another.")
            try:
                shutil.rmtree(staging, ignore_errors=True)
                restore(target)
                forget_replaced(target)
                check_export(output, sources, overwrite=overwrite)  # again, now that nobody else writes there
                _check_room(target.parent, size)
                staging.mkdir()
                yield staging
                if durable:
                    for path in [*staging.rglob("*"), staging]:
                        sync(path)
                take_place(staging, target)
                if durable:
                    sync(target.parent)
                made = []
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                lock_of(target).unlink()
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}). Nothing was published. Make room, or choose another --output."
        ) from None
    finally:
        for folder in made:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold. Raises CheckpointError with how much is missing."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: has {readable_size(free)} free, {readable_size(needed)} are needed. Nothing was written. Make "
            "room, or choose another --output."
        )
