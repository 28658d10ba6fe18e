"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def new_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write in, that takes the place and name of `output` when the block ends without an error.

    Nothing of an older folder is left in the new one: a stale shard would be read along.
    """
    check_free(output, overwrite=overwrite)
    staging = output.parent / f".writing-{output.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written here ({error}). Choose another --output.") from None
    try:
        yield staging
        if output.exists():
            replaced = output.parent / f".replaced-{output.name}"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(output, replaced)
            os.replace(staging, output)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(staging, output)
    except OSError as error:
        raise CheckpointError(f"{output}: could not be written ({error}). Nothing was published.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
