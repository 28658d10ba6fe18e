"""Containers: where each record of a file lies, and any of them by that place.

A reader first lists the places (`index`), which reads the file once in bounded memory and parses nothing, so that
records can be chosen, dealt to processes and read again in any order.
"""

from __future__ import annotations

import json
import mmap
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_vita.data.rejects import refuse
from megatron_vita.errors import ConfigError, DataError

Places = npt.NDArray[np.int64]
"""`[records, 3]`: record number (from 1; the line in a JSONL file), and two numbers that the reader understands."""

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],]', re.DOTALL)
_BLANK = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PEEK = 1 << 16


class Reader(ABC):
    """One data file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def index(self) -> Places:
        """Where every record lies, in file order.

        Raises:
            DataError: the file is not what its reader expects.
        """

    @abstractmethod
    def read(self, places: Places) -> Iterator[tuple[int, dict[str, Any] | list[Any] | DataError]]:
        """(record number, record) for each place, in that order; a DataError in place of a record that is broken."""

    def chunks(self, places: Places, size: int) -> list[Places]:
        """Cut chosen places into runs for one process each; here of `size` records."""
        return [places[start : start + size] for start in range(0, len(places), size)]


class _Bytes(Reader):
    """JSON records as byte ranges (second and third number of a place)."""

    def read(self, places: Places) -> Iterator[tuple[int, dict[str, Any] | list[Any] | DataError]]:
        with self.path.open("rb") as stream:
            for line, start, stop in places.tolist():
                stream.seek(start)
                yield line, _parse(stream.read(stop - start))


class JsonLines(_Bytes):
    """One record a line; blank lines are none."""

    def index(self) -> Places:
        found = array("q")
        with self.path.open("rb") as stream:
            start = 0
            for number, line in enumerate(stream, 1):
                stop = start + len(line)
                mark = number == 1 and line.startswith(_BYTE_ORDER_MARK)
                if line.removeprefix(_BYTE_ORDER_MARK if mark else b"").strip(_BLANK):
                    found.extend((number, start + len(_BYTE_ORDER_MARK) * mark, stop))
                start = stop
        return _places(found)


class JsonArray(_Bytes):
    """One array of records. Only strings, brackets and commas are looked at, so a broken record hurts no other."""

    def index(self) -> Places:
        found = array("q")
        with self.path.open("rb") as stream, _mapped(stream) as text:
            place = text.find(b"[")
            depth, start, number = 0, place + 1, 0
            for match in _TOKEN.finditer(text, max(place, 0)):
                mark = text[match.start()]
                if mark in b"{[":
                    depth += 1
                elif mark == ord(",") and depth == 1:
                    number += 1
                    found.extend((number, start, match.start()))
                    start = match.end()
                elif mark in b"}]":
                    depth -= 1
                    if depth == 0:
                        if text[start : match.start()].strip(_BLANK):
                            found.extend((number + 1, start, match.start()))
                        return _places(found)
            # The array never ends: what is left is one record, and a broken one.
            found.extend((number + 1, start, len(text)))
        return _places(found)


class Parquet(Reader):
    """Rows of row groups (second number of a place: the group, third: the row in it)."""

    def index(self) -> Places:
        with self._open() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        rows = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes] or [np.zeros(0, dtype=np.int64)])
        groups = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        return np.stack([np.arange(1, len(rows) + 1, dtype=np.int64), groups, rows], axis=1)

    def chunks(self, places: Places, size: int) -> list[Places]:
        """Whole row groups, so that none is decoded twice."""
        bounds = np.flatnonzero(np.diff(places[:, 1])) + 1
        return [chunk for chunk in np.split(places, bounds) if len(chunk)]

    def read(self, places: Places) -> Iterator[tuple[int, dict[str, Any] | list[Any] | DataError]]:
        with self._open() as file:
            for chunk in self.chunks(places, 0):
                yield from self._read_group(file, chunk)

    def _read_group(self, file: Any, places: Places) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        wanted = places[:, 2].tolist()
        waiting = 0
        start = 0
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=[int(places[0, 1])], use_threads=False):
                while waiting < len(wanted) and wanted[waiting] < start + batch.num_rows:
                    row = batch.slice(wanted[waiting] - start, 1).to_pylist()[0]
                    yield int(places[waiting, 0]), row
                    waiting += 1
                start += batch.num_rows
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            for line in places[waiting:, 0].tolist():
                yield line, refuse("bad_record", f"the row group cannot be decoded ({error}). Fetch the file again.")

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: not a whole parquet file ({error}). Fetch it again.") from None


KINDS: dict[str, type[Reader]] = {"json": JsonArray, "jsonl": JsonLines, "parquet": Parquet}
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz")


def open_reader(path: str | Path, kind: str = "auto", work: Path | None = None) -> Reader:
    """The reader of a file.

    Args:
        path: the data file.
        kind: `json`, `jsonl`, `parquet`, or `auto`: by content, since `.json` is the name of both JSON forms.
        work: folder for what is kept between runs (what was unpacked); none: a temporary one.

    Raises:
        ConfigError: no such file, or a container that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such data file. Correct `data_paths` in the data mix, or fetch the dataset.")
    if path.name.endswith(_PACKED):
        raise ConfigError(f"{path}: packed files are not read. Unpack it and name the file inside.")
    if kind == "auto":
        kind = _kind_of(path)
    if kind not in KINDS:
        raise ConfigError(f"{path}: no reader {kind!r}. Choose auto, {', '.join(KINDS)}.")
    return KINDS[kind](path)


def _kind_of(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(_PEEK)
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANK)
    if not text.startswith(b"["):
        return "jsonl"
    # `[` may also open the first line of a JSONL file whose records are bare lists of messages.
    first, newline, rest = text.partition(b"\n")
    if newline and rest.lstrip(_BLANK).startswith(b"["):
        record = _parse(first)
        if isinstance(record, list) and record and all(isinstance(turn, dict) for turn in record):
            return "jsonl"
    return "json"


def _parse(text: bytes) -> dict[str, Any] | list[Any] | DataError:
    try:
        record = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return refuse("bad_json", f"not UTF-8 at byte {error.start} of the record.")
    except (ValueError, RecursionError) as error:
        return refuse("bad_json", f"not JSON: {error}.")
    if not isinstance(record, dict | list):
        return refuse("bad_record", f"a record is an object, this is {type(record).__name__}.")
    return record


def _mapped(stream: BinaryIO) -> mmap.mmap:
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _places(flat: array[int]) -> Places:
    return np.frombuffer(flat, dtype=np.int64).reshape(-1, 3) if flat else np.zeros((0, 3), dtype=np.int64)


def prepare(path: str | Path, kind: str = "auto", work: Path | None = None, *, progress: bool = True) -> None:
    """Unpack and index what has no random access, once, before processes open the file.

    Args:
        path: the data file.
        kind: see `open_reader`.
        work: folder for what is kept between runs.
        progress: show bars for long ones.

    Raises:
        ConfigError: see `open_reader`.
        DataError: the container is damaged.
    """
    open_reader(path, kind, work)
