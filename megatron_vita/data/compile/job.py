"""Compiles chunks of records into spool files: what a preprocessing process does in the first phase."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.data.compile.record import Compiler, Rules
from megatron_vita.data.compile.reuse import EarlierSet
from megatron_vita.data.example import MediaItem
from megatron_vita.data.rejects import code_of
from megatron_vita.data.shards.manifest import SetInfo, check_example, reference_record
from megatron_vita.data.shards.writer.intermediate import Body, ChunkWriter, Region
from megatron_vita.data.shards.writer.plan import chunk_path
from megatron_vita.data.sources.mix import MixFile
from megatron_vita.data.sources.readers import Places
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError

_PLACE = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """A run of records of one file."""

    number: int
    """Of the chunk, over the whole mix."""
    file: int
    """Of the file in the mix."""
    places: Places
    """Which of its records."""
    killers: tuple[int, ...] = ()
    """Rows of `places` that have killed the process twice, and are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkJob:
    """Makes, in any process, the function that compiles a chunk."""

    tokenizer: str
    rules: Rules
    info: SetInfo
    files: Sequence[MixFile]
    work: Path
    sources_work: Path
    """Where readers and stores keep what they unpacked and indexed."""
    folder: Path
    """Of the set: references are relative to it."""
    earlier: EarlierSet | None = None
    """A set that holds some of the Examples already."""
    deaths: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """(chunk, row) -> processes that it killed; kept by the engine's process."""

    def open(self) -> Callable[[ChunkTask], None]:
        """The function that compiles one chunk into its spool file."""
        return _ChunkWorker(self).run

    def marker(self, number: int) -> Path:
        """File that says which record of a chunk is being compiled; gone once the chunk is done."""
        return self.work / "active" / f"{number:08d}"

    def died(self, task: ChunkTask, deaths: int) -> ChunkTask:
        """A decoder may crash on a broken file and take its process along: the record that does so twice is refused.

        Raises:
            DataError: the process dies elsewhere, again and again.
        """
        try:
            (row,) = _PLACE.unpack(self.marker(task.number).read_bytes())
        except (OSError, struct.error):
            row = -1
        self.deaths[task.number, row] += 1
        if row < 0 and self.deaths[task.number, row] >= 3:
            raise DataError(
                "compiling: the processes are killed before they read a record (out of memory?). Lower --workers and "
                "run again with --resume."
            )
        if row >= 0 and self.deaths[task.number, row] >= 2:
            return dataclasses.replace(task, killers=(*task.killers, row))
        return task


class _ChunkWorker:
    """Compiles chunks, one after the other."""

    def __init__(self, job: ChunkJob) -> None:
        self._job = job
        self._compiler = Compiler(VitaTokenizer.load(job.tokenizer), job.rules, job.sources_work)
        self._earlier = job.earlier.open() if job.earlier else None

    def run(self, task: ChunkTask) -> None:
        """Compile a chunk; its records stand in its spool file in order, whatever became of each."""
        job = self._job
        marker = os.open(job.marker(task.number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        writer = ChunkWriter(chunk_path(job.work, task.number))
        try:
            self._compile(task, writer, marker)
        except BaseException:
            writer.abort()
            raise
        finally:
            os.close(marker)
        writer.publish()
        job.marker(task.number).unlink()

    def _compile(self, task: ChunkTask, writer: ChunkWriter, marker: int) -> None:
        file = self._job.files[task.file]
        lines = task.places[:, 0].tolist()
        known = [self._earlier.find(task.file, line) if self._earlier else None for line in lines]
        fresh = [row for row, one in enumerate(known) if one is None and row not in task.killers]
        records = file.reader(self._job.sources_work).read(task.places[fresh])
        for row, (line, sample) in enumerate(zip(lines, known, strict=True)):
            os.pwrite(marker, _PLACE.pack(row), 0)
            if row in task.killers:
                writer.reject(line, "media_crash", "decoding its media killed the process.")
            elif sample is not None and self._earlier is not None:
                self._earlier.copy(sample, line, writer)
            else:
                self._record(next(records)[1], file, line, writer)

    def _record(self, record: object, file: MixFile, line: int, writer: ChunkWriter) -> None:
        try:
            made = self._compiler.compile(record, file, line)
        except DataError as error:
            writer.reject(line, *code_of(error))
            return
        check_example(made.example, self._job.info, f"{file.name}:{line}")
        bodies = [self._body(item) for item in made.example.media]
        changes = made.changes
        writer.add(
            line, made.example, bodies, shortened=made.shortened, cleaned=changes.cleaned, dropped=changes.dropped
        )

    def _body(self, item: MediaItem) -> Body:
        """Where a medium's bytes are to be taken from when its pack is written."""
        origin = item.origin
        if origin is None or origin.path is None:
            return item.data
        ours = Path(origin.path).is_relative_to(self._job.sources_work)  # unpacked for this run only
        if self._job.info.media == "reference":
            if ours:
                return item.data
            offset = None if origin.size is None else origin.offset
            return reference_record(item, Path(origin.path), self._job.folder, offset)
        try:
            stamp = -1 if ours else os.stat(origin.path).st_mtime_ns
        except OSError:
            return item.data
        return Region(origin.path, origin.offset, len(item.data), stamp)
