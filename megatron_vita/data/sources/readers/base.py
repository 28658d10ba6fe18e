"""The interface of readers, and the parser of a record's JSON text."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.rejects import reject
from megatron_vita.errors import DataError

RecordOffsets = npt.NDArray[np.int64]
"""`[records, 3]`: record number (from 1; the line of a JSONL file), and two numbers that each reader defines."""
Record = dict[str, Any] | list[Any]

MAX_RECORD = 256 << 20
"""Bytes of the largest record that is parsed: Python holds the text and what it says, and a process has 1 GiB."""
_LARGE = 8 << 20
_ASTRAL = re.compile(rb"[\xf0-\xf4][\x80-\xbf]{3}")


class Reader(ABC):
    """One data file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def index(self) -> RecordOffsets:
        """List the offsets of all records, in file order.

        Raises:
            DataError: the file is not what its reader expects.
            ConfigError: it cannot be used as it is; the message says what to do.
        """

    @abstractmethod
    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        """(record number, record) of each offset, in that order; a DataError instead of a broken record."""

    def head(self, count: int) -> list[Record | DataError]:
        """The first records, without listing all where the container allows that.

        Raises:
            DataError: as `index`.
        """
        return [record for _, record in self.read(self.index()[:count])]

    def prepare(self, *, progress: bool = True) -> None:  # noqa: B027  (nothing to prepare is a fine default)
        """Unpack what has no random access, once.

        Args:
            progress: show a bar for long ones.

        Raises:
            DataError: the container is damaged.
            ConfigError: it cannot be used as it is.
        """

    def chunks(self, offsets: RecordOffsets, size: int) -> list[RecordOffsets]:
        """Split chosen offsets into chunks, each for one process; by default of `size` records."""
        return [offsets[start : start + size] for start in range(0, len(offsets), size)]


def parse_record(text: bytes) -> Record | DataError:
    """Parse the JSON text of a record; a DataError (bad_json or bad_record) if it is none."""
    if len(text) > MAX_RECORD:
        return reject("bad_record", f"{len(text)} bytes are one record; at most {MAX_RECORD} are read.")
    if len(text) > _LARGE:
        # one emoji would make Python hold four bytes for every character of the text
        text = _ASTRAL.sub(_escape, text)
    try:
        decoded = text.decode("utf-8-sig")
        del text  # a large record must not lie in memory twice while it is parsed
        record = json.loads(decoded)
    except UnicodeDecodeError as error:
        return reject("bad_json", f"not UTF-8 at byte {error.start} of the record.")
    except (ValueError, RecursionError) as error:
        return reject("bad_json", f"not JSON: {error}.")
    if not isinstance(record, dict | list):
        return reject("bad_record", f"a record is an object, this is {type(record).__name__}.")
    return record


def as_offsets(flat: array[int]) -> RecordOffsets:
    """A flat array of (record number, second number, third number) as RecordOffsets."""
    return np.frombuffer(flat, dtype=np.int64).reshape(-1, 3) if flat else np.zeros((0, 3), dtype=np.int64)


def _escape(match: re.Match[bytes]) -> bytes:
    try:
        return json.dumps(match.group().decode("utf-8"))[1:-1].encode()
    except UnicodeDecodeError:
        return match.group()
