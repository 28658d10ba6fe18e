"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint.journal import Journal
from megatron_vita.errors import CheckpointError, ConfigError

_MARKS = ("config.json", "model.safetensors", "model.safetensors.index.json")


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, before any work is done.

    Raises:
        ConfigError: it holds something; with `overwrite`, something that is no Hugging Face folder.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"{output}: exists and is not empty. Choose another --output, or replace it with --overwrite."
        )
    if not any((output / mark).is_file() for mark in _MARKS):
        raise ConfigError(f"{output}: is not a Hugging Face folder, so --overwrite will not delete it. Choose another.")


@contextmanager
def new_folder(output: Path, *, overwrite: bool, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """A folder to write in, that takes the place and name of `output` when the block ends without an error.

    Nothing of an older folder is left in the new one: a stale shard would be read along. What a killed process with the
    same identity has finished is still there.

    Args:
        identity: JSON values that say what is written, from what.

    Raises:
        ConfigError: nothing can be written there, or something is there and not to be replaced.
        CheckpointError: no space. Nothing is published then.
    """
    check_free(output, overwrite=overwrite)
    staging = output.parent / f".writing-{output.name}"
    try:
        with Journal(staging, identity, output) as journal:
            yield journal
            replaced = output.parent / f".replaced-{output.name}"
            shutil.rmtree(replaced, ignore_errors=True)
            if output.exists():
                os.replace(output, replaced)
            os.replace(staging, output)
            shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}). Nothing was published. Make room, or choose another --output."
        ) from None
