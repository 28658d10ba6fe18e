"""Parquet: rows of row groups, with whatever types their columns have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.readers.base import Reader, Record, RecordOffsets
from megatron_vita.errors import DataError

_ROWS = 16
"""Rows decoded at once: with pictures in them, some ten megabytes."""
_BUFFER = 1 << 20
"""Bytes of a column that are read at once; without it, a row group's whole column is."""


class Parquet(Reader):
    """Rows of row groups (second number of an offset: the row group, third: the row in it)."""

    def index(self) -> RecordOffsets:
        with self._open() as file:
            try:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                rows = np.concatenate([np.arange(size, dtype=np.int64) for size in (0, *sizes)])
            except _errors() as error:
                raise DataError(f"{self.path}: its footer is damaged ({error}). Fetch it again.") from None
            except MemoryError:
                raise DataError(f"{self.path}: its footer counts absurdly many rows. Fetch it again.") from None
        groups = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        return np.stack([np.arange(1, len(rows) + 1, dtype=np.int64), groups, rows], axis=1)

    def chunks(self, offsets: RecordOffsets, size: int) -> list[RecordOffsets]:
        """Split at row groups, so that none is decoded twice; a repetition of records begins a new chunk."""
        new = (np.diff(offsets[:, 1]) != 0) | (np.diff(offsets[:, 2]) < 0)
        return [chunk for chunk in np.split(offsets, np.flatnonzero(new) + 1) if len(chunk)]

    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        with self._open() as file:
            for chunk in self.chunks(offsets, 0):
                yield from self._read_group(file, chunk)

    def _read_group(self, file: Any, offsets: RecordOffsets) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        wanted = offsets[:, 2].tolist()
        waiting = 0
        start = 0
        reason: object = "it ends early"
        try:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[int(offsets[0, 1])], use_threads=False):
                while waiting < len(wanted) and wanted[waiting] < start + batch.num_rows:
                    yield int(offsets[waiting, 0]), _row(batch.slice(wanted[waiting] - start, 1))
                    waiting += 1
                start += batch.num_rows
                if waiting == len(wanted):
                    return
        except _errors() as error:
            reason = error
        for line in offsets[waiting:, 0].tolist():
            yield line, reject("bad_record", f"the row group cannot be decoded ({reason}). Fetch the file again.")

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path, buffer_size=_BUFFER)
        except _errors() as error:
            raise DataError(f"{self.path}: not a whole parquet file ({error}). Fetch it again.") from None


def _row(batch: Any) -> dict[str, Any] | DataError:
    try:
        return dict(batch.to_pylist()[0])
    except _errors() as error:  # text that is no UTF-8, a date beyond the calendar, a type without a Python one
        return reject("bad_record", f"the row cannot be decoded ({error}).")


def _errors() -> tuple[type[Exception], ...]:
    """Exceptions of pyarrow; some of its own are no OSError, ValueError or LookupError."""
    import pyarrow as pa

    return (pa.lib.ArrowException, OSError, ValueError, ArithmeticError, LookupError)
