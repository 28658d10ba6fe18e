"""Atomic publication of a folder: it appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.folder import forget_replaced, restore, take_place
from megatron_vita.checkpoint.journal import Journal, check_room, is_sealed
from megatron_vita.convert.outputs import DIGESTS_FILE, check_export, staging_of
from megatron_vita.errors import CheckpointError


@contextmanager
def new_folder(
    output: Path,
    sources: Iterable[str | Path | None],
    *,
    overwrite: bool,
    identity: Mapping[str, Any],
    size: int,
) -> Iterator[Journal]:
    """A folder to write in, that takes the place and name of `output` when the block ends without an error.

    Nothing of an older folder is left in the new one: a stale shard would be read along. What a killed process with the
    same identity has finished is still there; if it had finished all, the journal says `published`, and nothing is to
    be written.

    Args:
        output: a link is followed.
        sources: folders that are read, see check_export.
        identity: JSON values that say what is written, from what.
        size: bytes that will be written.

    Raises:
        ConfigError: nothing can be written there, or something is there and not to be replaced.
        CheckpointError: no space. Nothing is published then.
    """
    sources, target = list(sources), output.resolve()
    staging = staging_of(target)
    try:
        if not is_sealed(staging, target):
            check_room(target.parent, size, staging)
        with Journal(staging, identity, target) as journal:
            if not journal.published:
                restore(target)
                forget_replaced(target)
                check_export(output, sources, overwrite=overwrite)  # again, now that nobody else writes there
            yield journal
            if not journal.published:
                journal.seal(DIGESTS_FILE)
                take_place(staging, target)
            forget_replaced(target)
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}). Nothing was published. Make room, or choose another --output."
        ) from None
