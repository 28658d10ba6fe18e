"""Digests of everything that determines an answer: an answer on disk is reused only while its digest is unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_vita import __version__
from megatron_vita.checkpoint import integrity
from megatron_vita.checkpoint.streams import digest_of
from megatron_vita.config.load import to_dict
from megatron_vita.convert import OpenModel
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.device import torch_device
from megatron_vita.errors import VitaError
from megatron_vita.files import new_digest

_FORMAT = 2
"""Incremented when a newer package answers the same question of the same model otherwise."""
_PACKAGES = ("torch", "megatron-core", "tokenizers", "sentencepiece", "jinja2", "numpy", "pillow", "av", "decord")
"""Packages that compute ids, pixels, frames and logits."""
_UNRELATED = ("README.md", "LICENSE")
_BLOCK_BYTES = 8 << 20


def model_key(opened: OpenModel, dtype: str) -> str:
    """Digest of what determines a model's answers: weights, settings, tokenizer, chat template, preprocessing, dtype
    and the packages that compute them. A checkpoint is identified by its integrity file; of any other folder every byte
    is read.

    Raises:
        ConfigError, CheckpointError: no tokenizer, or a file that cannot be read.
    """
    is_checkpoint = integrity.is_checkpoint(opened.path)
    text = [] if opened.tokenizer_dir == opened.path else _files(opened.tokenizer_dir, below=is_checkpoint)
    return digest_of_parts(
        _FORMAT,
        {"megatron_vita": __version__, **{name: _version(name) for name in _PACKAGES}},
        integrity.fingerprint(opened.path) if is_checkpoint else _files(opened.path),
        text,
        VitaTokenizer.load(opened.tokenizer_dir).template_sha256,  # the package's own, where the folder has none
        to_dict(opened.model),
        opened.preprocess and opened.preprocess.to_dict(),
        f"torch.{dtype}",
        torch_device().type,
    )


class MediaKeys:
    """Digests of media, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str | None, int, int | None, float], str] = {}

    def key(self, file: MediaFile) -> str:
        """Digest of a medium's bytes, and of the part that is asked for. One that cannot be read has a digest, too;
        reading it raises the error."""
        content = self._content(file)
        return content if (file.start, file.end) == (0.0, None) else digest_of_parts(content, file.start, file.end)

    def _content(self, file: MediaFile) -> str:
        if file.frames:  # clips that share their frames read them once
            return digest_of_parts(file.frame_rate, *map(self._content, file.frames))
        if file.data is not None:
            return _content(file)
        place = (file.path, file.offset, file.size, file.frame_rate)
        if place not in self._known:
            self._known[place] = self._read(file)
        return self._known[place]

    def _read(self, file: MediaFile) -> str:
        return _content(file)


def run_key(model: str, settings: Mapping[str, Any], question: str) -> str:
    """16 hex digits that change with any part."""
    return digest_of_parts(model, settings, question)[:16]


def _content(file: MediaFile) -> str:
    """Digest of a medium's bytes; of a folder of frames, of their names, bytes and rate."""
    if file.data is not None:
        return hashlib.sha256(file.data).hexdigest()
    assert file.path is not None
    path = Path(file.path)
    if path.is_dir():
        return digest_of_parts(file.frame_rate, _files(path))
    try:
        digest, left = new_digest(), file.size if file.size is not None else path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(file.offset)
            while left and (block := stream.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest() + path.suffix
    except OSError as error:
        return f"{path}: {error}"


def _files(folder: Path, *, below: bool = True) -> list[list[str]]:
    """Name and digest of a folder's files, and of those below; files that only people read are excluded."""
    found = []
    for path in sorted(folder.rglob("*") if below else folder.glob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.name not in _UNRELATED and not any(part.startswith(".") for part in name.parts):
            try:
                found.append([name.as_posix(), digest_of(path, 0, path.stat().st_size)])
            except (VitaError, OSError) as error:
                found.append([name.as_posix(), str(error)])
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def digest_of_parts(*parts: Any) -> str:
    """SHA-256, in hex, of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
