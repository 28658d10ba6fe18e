"""Rows of a benchmark's files one after the other: parquet, JSON, and the tab-separated tables of VLMEvalKit."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_vita.data.sources.readers import open_reader
from megatron_vita.errors import DataError

MAX_LINE = 256 << 20
"""Characters of the longest line of a table: a row with several large pictures."""

Row = dict[str, Any]


def read_rows(files: Sequence[Path]) -> Iterator[tuple[int, str, Row]]:
    """(number from 1 through all files, where it stands, row).

    Raises:
        DataError: naming file and row, where it cannot be read.
        ConfigError: as `open_reader`.
    """
    number = 0
    for file in files:
        for at, row in _tsv(file) if file.suffix == ".tsv" else _records(file):
            number += 1
            yield number, f"{file}, row {at}", row


def _records(file: Path) -> Iterator[tuple[int, Row]]:
    reader = open_reader(file)
    for at, record in reader.read(reader.index()):
        if isinstance(record, DataError):
            raise DataError(f"{file}, row {at}: {record}")
        if not isinstance(record, dict):
            raise DataError(f"{file}, row {at}: bad_record: a row is an object, this is {type(record).__name__}.")
        yield at, record


def _tsv(file: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_LINE)  # of the process; the lines are bounded by ourselves
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.reader(_lines(stream, file), delimiter="\t", strict=True)
            names = next(table, [])
            for at, cells in enumerate(table, 1):
                if len(cells) != len(names):
                    raise DataError(
                        f"{file}, row {at}: {len(cells)} cells under {len(names)} names. Fetch the file again."
                    )
                yield at, dict(zip(names, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no table of tab-separated texts in UTF-8 ({error}). Fetch it again.") from None


def _lines(stream: TextIO, file: Path) -> Iterator[str]:
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise DataError(f"{file}: a line of more than {MAX_LINE} characters is no row of a benchmark.")
        yield line
