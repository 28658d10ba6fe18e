"""Verify every byte of one folder against the digests beside it."""

from __future__ import annotations

from pathlib import Path

from megatron_vita.checkpoint.folder import resolve
from megatron_vita.checkpoint.integrity import Integrity
from megatron_vita.checkpoint.streams import byte_bar, digest_of
from megatron_vita.convert.outputs import DIGESTS_FILE, listed_by_digests
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.files import readable_size


def check_bytes(path: Path, *, progress: bool = False) -> str:
    """Read every byte of a checkpoint (of the newest one in a folder of them), or of an exported Hugging Face folder.

    Args:
        progress: show a bar on standard error.

    Returns:
        One line: what was verified, files and bytes.

    Raises:
        CheckpointError: a file is missing or damaged; named.
        ConfigError: there are no digests.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder. Give a checkpoint or an exported Hugging Face folder.")
    if (path / DIGESTS_FILE).is_file():
        listed = listed_by_digests(path)
        if not listed:
            raise CheckpointError(f"{path / DIGESTS_FILE}: damaged, or names what lies outside. Export it again.")
        sizes = {name: _size(path / name) for name in listed}
        with byte_bar(sum(sizes.values()), show=progress) as bar:
            for name, digest in listed.items():
                if digest_of(path / name, 0, sizes[name]) != digest:
                    raise CheckpointError(f"{path / name}: damaged, its digest is another. Export it again.")
                bar.update(sizes[name])
    elif (path / "config.json").is_file():
        raise ConfigError(
            f"{path}: has no {DIGESTS_FILE} to check its files against. Compare it with another model: verify A B."
        )
    else:
        path = resolve(path)
        found = Integrity.read(path)
        sizes = {name: entry["bytes"] for name, entry in found.files.items()}
        with byte_bar(sum(sizes.values()), show=progress) as bar:
            found.check_all(advance=bar.update)
    total = sum(sizes.values())
    return f"verified: {len(sizes)} files, {total} bytes ({readable_size(total)}) of {path}"


def _size(path: Path) -> int:
    """Raises CheckpointError: no such file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing. Export it again.")
    return path.stat().st_size
