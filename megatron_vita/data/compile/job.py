"""First phase of preprocessing: worker processes compile chunks of records into intermediate shards."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.data.compile.inputs import Inputs
from megatron_vita.data.compile.messages import portable
from megatron_vita.data.compile.record import Compiler, Rules
from megatron_vita.data.compile.reuse import EarlierSet
from megatron_vita.data.example import MediaItem
from megatron_vita.data.rejects import code_of
from megatron_vita.data.shards.manifest import SetInfo, check_example, reference_record
from megatron_vita.data.shards.writer.intermediate import Body, ChunkWriter, Region
from megatron_vita.data.shards.writer.plan import chunk_path
from megatron_vita.data.sources.mix import MixFile
from megatron_vita.data.sources.readers import RecordOffsets
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError

_PLACE = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """A chunk of records of one file."""

    number: int
    """Number of the chunk in the whole mix."""
    file: int
    """Number of the file in the mix."""
    offsets: RecordOffsets
    """Offsets of the records of the chunk."""
    poison: tuple[int, ...] = ()
    """Rows of `offsets` that have killed the process twice, and are rejected."""
    outcomes: tuple[tuple[str, str], ...] = ()
    """For a `RetryJob`: (code, message) with which each record was rejected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkJob:
    """Factory of the function that compiles a chunk, for any process."""

    tokenizer: str
    rules: Rules
    info: SetInfo
    files: Sequence[MixFile]
    work: Path
    sources_work: Path
    """Cache folder of readers and stores: unpacked copies and indexes."""
    folder: Path
    """Folder of the set; media references are relative to it."""
    earlier: EarlierSet | None = None
    """A set that holds some of the Examples already."""
    deaths: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """(chunk, row) -> processes that it killed; kept by the engine's process."""

    @classmethod
    def of(cls, inputs: Inputs, earlier: EarlierSet | None = None) -> ChunkJob:
        """The job of a run; `earlier` is a set that holds some of the Examples already."""
        options = inputs.options
        return cls(
            tokenizer=str(options.tokenizer),
            rules=Rules(
                spec=options.spec,
                seq_length=options.seq_length,
                overlong=options.overlong,
                verify_media=options.verify_media,
                video_limits=options.video_limits,
                video_backend=options.video_backend,
            ),
            info=inputs.info,
            files=inputs.files,
            work=inputs.work,
            sources_work=inputs.work / "sources",
            folder=inputs.prefix.parent,
            earlier=earlier,
        )

    def open(self) -> Callable[[ChunkTask], Any]:
        """The function that compiles one chunk into its intermediate shard."""
        return _ChunkWorker(self).run

    def marker(self, number: int) -> Path:
        """File with the number of the record of a chunk that is being compiled; removed once the chunk is done."""
        return self.work / "active" / f"{number:08d}"

    def died(self, task: ChunkTask, deaths: int) -> ChunkTask:
        """Retry a chunk whose process died; a record that kills a process twice (a decoder crash) becomes poison.

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
            return dataclasses.replace(task, poison=(*task.poison, row))
        return task


class RetryJob(ChunkJob):
    """Compiles rejected records again, without writing: media that were missing may be there now."""

    __slots__ = ()

    def open(self) -> Callable[[ChunkTask], bool]:
        """The function that returns whether any record of a task has another outcome than before."""
        return _ChunkWorker(self).retry


class _ChunkWorker:
    """Compiles chunks, one after the other."""

    def __init__(self, job: ChunkJob) -> None:
        self._job = job
        self._compiler = Compiler(VitaTokenizer.load(job.tokenizer), job.rules, job.sources_work)
        self._earlier = job.earlier.open() if job.earlier else None

    def run(self, task: ChunkTask) -> None:
        """Compile a chunk. Its intermediate shard holds all records in order, compiled or rejected."""
        job = self._job
        marker = self._marker(task)
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

    def retry(self, task: ChunkTask) -> bool:
        """Whether any record of the task has another outcome than before. Nothing is written."""
        file = self._job.files[task.file]
        marker = self._marker(task)
        try:
            if task.poison:
                return True
            records = file.reader(self._job.sources_work).read(task.offsets)
            for row, ((line, record), outcome) in enumerate(zip(records, task.outcomes, strict=True)):
                os.pwrite(marker, _PLACE.pack(row), 0)
                try:
                    self._compiler.compile(record, file, line)
                except DataError as error:
                    if self._outcome(error, file) == outcome:
                        continue
                return True
            return False
        finally:
            os.close(marker)
            self._job.marker(task.number).unlink()

    def _marker(self, task: ChunkTask) -> int:
        return os.open(self._job.marker(task.number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def _outcome(self, error: DataError, file: MixFile) -> tuple[str, str]:
        """(error code, message) as a set holds them."""
        code, message = code_of(error)
        return code, portable(message, file, self._job.work)

    def _compile(self, task: ChunkTask, writer: ChunkWriter, marker: int) -> None:
        file = self._job.files[task.file]
        lines = task.offsets[:, 0].tolist()
        known = [self._earlier.find(task.file, line) if self._earlier else None for line in lines]
        fresh = [row for row, one in enumerate(known) if one is None and row not in task.poison]
        records = file.reader(self._job.sources_work).read(task.offsets[fresh])
        for row, (line, sample) in enumerate(zip(lines, known, strict=True)):
            os.pwrite(marker, _PLACE.pack(row), 0)
            if row in task.poison:
                writer.reject(line, "media_crash", "decoding its media killed the process.")
            elif sample is not None and self._earlier is not None:
                self._earlier.copy(sample, line, writer)
            else:
                self._record(next(records)[1], file, line, writer)

    def _record(self, record: object, file: MixFile, line: int, writer: ChunkWriter) -> None:
        try:
            made = self._compiler.compile(record, file, line)
        except DataError as error:
            writer.reject(line, *self._outcome(error, file))
            return
        check_example(made.example, self._job.info, f"{file.name}:{line}")
        bodies = [self._body(item) for item in made.example.media]
        changes = made.changes
        for note in changes.notes:
            writer.note(note)
        writer.add(
            line, made.example, bodies, shortened=made.shortened, cleaned=changes.cleaned, dropped=changes.dropped
        )

    def _body(self, item: MediaItem) -> Body:
        """Source of a medium's bytes for the write phase: the bytes, a file region, or a reference."""
        origin = item.origin
        if origin is None or origin.path is None:
            return item.data
        unpacked = Path(origin.path).is_relative_to(self._job.sources_work)  # exists for this run only
        if self._job.info.media == "reference":
            if unpacked:
                return item.data
            offset = None if origin.size is None else origin.offset
            return reference_record(item, Path(origin.path), Path(os.path.realpath(self._job.folder)), offset)
        try:
            stamp = -1 if unpacked else os.stat(origin.path).st_mtime_ns
        except OSError:
            return item.data
        return Region(origin.path, origin.offset, len(item.data), stamp)
