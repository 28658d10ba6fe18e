"""Fingerprint of a model's folder, by its content: a run knows its start again after the folder has moved."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megatron_vita.checkpoint import integrity

_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


def fingerprint(folder: str | Path) -> str:
    """A digest of what a model's folder holds; hexadecimal. Its path and times do not count.

    A checkpoint's integrity file holds the digests of all its files. Of any other folder, all JSON files count whole,
    and of each file of weights its name, size, header, and 16 blocks of 64 KiB, evenly spaced from its first to its
    last byte: other weights almost surely differ there, and 30 GB need not be read. A few changed values may not.

    Args:
        folder: the checkpoint itself (OpenModel.path), or the Hugging Face folder.
    """
    folder = Path(folder)
    if integrity.is_checkpoint(folder):
        return integrity.fingerprint(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.json")):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("mp_rank_*/*.pt")]):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                digest.update(stream.read(min(int.from_bytes(stream.read(8), "little"), size)))
            last = max(0, size - _SAMPLE_BYTES)
            for index in range(_SAMPLES):
                digest.update(os.pread(stream.fileno(), _SAMPLE_BYTES, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()
