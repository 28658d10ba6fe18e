"""Atomic publication of a folder: it appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.checkpoint.folder import check_room, forget_replaced, made, restore, take_place
from megatron_vita.convert.outputs import check_export, lock_of, staging_of
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import lock_file, sync


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Resources of a conversion; the bytes it writes depend on none of them."""

    workers: int | None = None
    """Threads, by default one more than there are cores (streams.default_workers)."""
    durable: bool = False
    """Wait until the disk has everything, which `cp` does not."""
    progress: bool = False
    """Show a bar on standard error."""


USUAL = Effort()


@contextmanager
def new_folder(
    output: Path, sources: Iterable[str | Path | None], *, overwrite: bool, size: int, durable: bool
) -> Iterator[Path]:
    """A folder to write in, that takes the place and name of `output` when the block ends without an error.

    Nothing of an older folder is left in the new one: a stale shard would be read along. What a killed process has left
    of its own is deleted. Raises ConfigError: nothing can be written there, another process is just doing so, or
    something is there and not to be replaced; CheckpointError: no space. Nothing is published then.

    Args:
        output: a link is followed.
        sources: folders that are read, see check_export.
        size: bytes that will be written.
        durable: wait until the disk has everything before the folder gets its name.
    """
    sources, target = list(sources), output.resolve()
    staging = staging_of(target)
    with made(target.parent), lock_file(lock_of(target)) as alone:
        if not alone:
            raise ConfigError(f"{output}: another process is writing it. Wait for it, or choose another.")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            restore(target)
            forget_replaced(target)
            check_export(output, sources, overwrite=overwrite)  # again, now that nobody else writes there
            check_room(target.parent, size)
            staging.mkdir()
            yield staging
            for path in [*staging.rglob("*"), staging] if durable else []:
                sync(path)
            take_place(staging, target)
            if durable:
                sync(target.parent)
        except OSError as error:
            raise CheckpointError(
                f"{output}: could not be written ({error}). Nothing was published. Make room, or choose another "
                "--output."
            ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock_of(target).unlink()
