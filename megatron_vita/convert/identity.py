"""Fingerprint of a folder's weights, by which a killed conversion decides whether it may resume."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_vita.checkpoint import integrity
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE
from megatron_vita.checkpoint.streams import digest_of

_SMALL = 64 * 1024**2
"""Bytes: no file of a tokenizer is larger, and hardly a file of weights smaller."""


def identity_of(folder: str | Path) -> list[list[str | int]]:
    """A checkpoint's fingerprint; of any other folder name, size and time of change of every file.

    Reading a downloaded folder whole only to know that it is the same would cost as much as converting it.
    """
    folder = Path(folder).resolve()
    if integrity.is_checkpoint(folder):
        return [[INTEGRITY_FILE, integrity.fingerprint(folder)]]
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def fingerprint(folder: str | Path) -> str:
    """A digest that changes when a model's files change, without reading its weights; hexadecimal.

    A checkpoint's integrity file holds the digests of all its tensors; of a Hugging Face folder, the names, sizes and
    times of the weights stand for them.

    Args:
        folder: the checkpoint itself (OpenModel.path), or the Hugging Face folder.
    """
    folder = Path(folder)
    if integrity.is_checkpoint(folder):
        return integrity.fingerprint(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.json")):
        digest.update(file.name.encode() + file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def identity_of_tokenizer(folder: str | Path) -> list[list[str]]:
    """Name and digest of a tokenizer's files, without their times: it may have been created just now. Files of
    weights beside it are excluded by their size."""
    folder = Path(folder).resolve()
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return [
        [path.relative_to(folder).as_posix(), digest_of(path, 0, size)]
        for path, size in sizes.items()
        if size <= _SMALL
    ]
