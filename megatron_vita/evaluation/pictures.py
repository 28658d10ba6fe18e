"""Pictures that a table holds, in one file beside the results: questions refer to regions of it."""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import MediaFile, Sample
from megatron_vita.errors import ConfigError

MOST_REFERENCE = 64
"""Characters of the longest text in VLMEvalKit's `image` column that is another row's index, and no picture."""


class PictureFile:
    """Appends pictures, each once, so that a table of any size is read without holding its pictures in memory.

    The same table gives the same file. Use it as a context manager: the file is there when that ends.
    """

    def __init__(self, path: Path) -> None:
        """Begin it.

        Raises:
            ConfigError: it cannot be written.
        """
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._known: dict[bytes, tuple[int, int]] = {}
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._partial.open("wb")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}. Check --output.") from None

    def __enter__(self) -> PictureFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stream.close()
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}. Check --output.") from None
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, data: bytes, label: str) -> MediaFile:
        """Append a picture, if it is new; `label` is what messages call it.

        Raises:
            ConfigError: it cannot be written.
        """
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            try:
                self._stream.write(data)
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be written: {error.strerror}. Check --output.") from None
            self._known[digest] = (self._size, len(data))
            self._size += len(data)
        offset, size = self._known[digest]
        return MediaFile(path=str(self.path), offset=offset, size=size, label=label)

    def keep(self, sample: Sample) -> Sample:
        """A sample whose media lie in the file instead of in memory.

        Raises:
            ConfigError: it cannot be written.
        """
        images, videos = (tuple(map(self._kept, files)) for files in (sample.images, sample.videos))
        return dataclasses.replace(sample, images=images, videos=videos)

    def _kept(self, file: MediaFile) -> MediaFile:
        if file.data is not None:
            place = self.add(file.data, file.name)
            return dataclasses.replace(file, path=place.path, data=None, offset=place.offset, size=place.size)
        return dataclasses.replace(file, frames=tuple(map(self._kept, file.frames))) if file.frames else file


def read_pictures(value: Any, pictures: PictureFile, find: Callable[[str], MediaFile], label: str) -> list[MediaFile]:
    """The pictures of a cell.

    Args:
        value: bytes; base64; {"bytes", "path"} as Hugging Face writes pictures; a list of these, or a text that spells
            such a list; None: no picture.
        pictures: where they are kept.
        find: resolves a path in the cell, where there are no bytes.
        label: what messages call the cell.

    Raises:
        DataError: media_broken, if it is no base64; as `find` does.
        ConfigError: they cannot be kept.
    """
    if isinstance(value, str):
        value = spelt_list(value) or value
    if isinstance(value, list):
        return [one for part in value for one in read_pictures(part, pictures, find, label)]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return [find(value)]
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise reject("media_broken", f"{label}: `image` is no base64. Fetch the file again.") from None
    if not isinstance(value, bytes):
        raise reject("bad_record", f"{label}: a picture is bytes or base64, this is {type(value).__name__}.")
    return [pictures.add(value, label)]


def spelt_list(text: str) -> list[str] | None:
    """The texts of a list that is written as Python writes it (VLMEvalKit's tables do); None where it is none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError):
        return None
    return found if found and all(isinstance(one, str) for one in found) else None
