"""Compile a data mix into a packed shard set: read, compile in many processes, pack, write in many processes, publish.

In the first phase, worker processes compile chunks of records into intermediate shards. This process packs the lengths
of their Examples, which fixes every offset of every file. In the second phase, worker processes write ranges of packs;
they copy pictures from their original files. The set depends on the mix, the settings, the seed and the data alone, not
on the executor, on paths, or on interruptions: finished work stays in the work folder until the set is published.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from megatron_vita import __version__
from megatron_vita.data.compile import rejected as rejects
from megatron_vita.data.compile.engines import Executor, LocalExecutor, open_executor
from megatron_vita.data.compile.inputs import Inputs, Options, read_inputs
from megatron_vita.data.compile.job import ChunkJob, ChunkTask
from megatron_vita.data.compile.notes import count_notes, describe_notes
from megatron_vita.data.compile.retry import any_changed, forget_outdated, rejected_for_media
from megatron_vita.data.compile.reuse import EarlierSet
from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.manifest import Manifest, Reject, SourceCounts, load_manifest
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.plan import EntryTable, Plan, chunk_path
from megatron_vita.data.shards.writer.publish import hold_work_folder, write_rejects, write_set
from megatron_vita.data.sources.media_store import store as stores
from megatron_vita.data.sources.to_sample import TAG_AS_TEXT
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.files import no_room

__all__ = ["Options", "run"]

CHUNK = 128
"""Records of a chunk."""

log = logging.getLogger(__name__)


def run(options: Options) -> Manifest:
    """Compile a mix.

    The files get their final names once all of them are written, the manifest last; an earlier set of the same name
    stays whole until then. An interrupted run leaves `DIR/.PREFIX.work`, from which `resume` continues; without
    `resume` the folder is discarded.

    Returns:
        The manifest of the set, just written or (with `resume`) found finished.

    Raises:
        ConfigError: settings, mix or tokenizer are wrong; nothing was written.
        DataError: a data file cannot be read, no record is left, more of a source was rejected than `max_rejected`
            allows, or the disk is full.
    """
    inputs = read_inputs(options)
    try:
        return _run(inputs)
    except OSError as error:
        if not no_room(error):
            raise
        raise DataError(
            f"--output {inputs.prefix}: cannot be written ({error.strerror}). Make room and go on with --resume."
        ) from None


def _run(inputs: Inputs) -> Manifest:
    options = inputs.options
    # the same chunks have the same numbers: said by whoever cuts them
    described = f"{inputs.digest} {CHUNK} {__version__}"
    held = hold_work_folder(inputs.prefix, described, resume=options.resume)
    with held as ready, open_executor(options.engine, options.workers) as engine:
        if ready is not None:
            return ready
        finished = _finished(inputs) if options.resume else None
        rejected = rejected_for_media(inputs) if finished is not None else {}
        chunks = _chunks(inputs) if finished is None or rejected else []
        if finished is not None and not any_changed(inputs, chunks, rejected, engine):
            log.info("%s is finished and its inputs are the same: kept", options.output)
            shutil.rmtree(inputs.work)
            return finished
        if options.resume:
            forget_outdated(inputs, chunks, engine)
        _compile(inputs, chunks, _earlier(inputs, finished) if options.resume else None, engine)
        sources = _sources(inputs, chunks)
        return _write(inputs, chunks, sources, engine)


def _chunks(inputs: Inputs) -> list[ChunkTask]:
    """Split the chosen records into chunks, which do not depend on the executor."""
    chunks: list[ChunkTask] = []
    sources_work = inputs.work / "sources"
    try:
        for rule in dict.fromkeys(file.media for file in inputs.files):
            stores.prepare(rule, sources_work, progress=inputs.options.progress)
        for number, file in enumerate(inputs.files):
            reader = file.reader(sources_work)
            reader.prepare(progress=inputs.options.progress)
            chosen = file.choose(reader.index(), inputs.options.seed, sources_work)
            parts = reader.chunks(chosen, CHUNK)
            chunks += [ChunkTask(n, number, part) for n, part in enumerate(parts, len(chunks))]
    except VitaError:
        if not (inputs.work / "intermediate").exists():  # nothing is compiled yet that could be kept
            shutil.rmtree(inputs.work)
        raise
    return chunks


def _compile(inputs: Inputs, chunks: Sequence[ChunkTask], earlier: EarlierSet | None, engine: Executor) -> None:
    """Compile every chunk that has no intermediate shard yet."""
    options, work = inputs.options, inputs.work
    for folder in {chunk_path(work, task.number).parent for task in chunks}:
        folder.mkdir(parents=True, exist_ok=True)
    todo = [task for task in chunks if not chunk_path(work, task.number).exists()]
    job = ChunkJob.of(inputs, earlier)
    total = sum(len(task.offsets) for task in chunks)
    done = total - sum(len(task.offsets) for task in todo)
    # What was being compiled when a run ended may have ended it: it gets a process of its own, whose end is survived.
    suspects = [task for task in todo if job.marker(task.number).exists()] if options.workers == 1 else []
    alone = {task.number for task in suspects}
    rest = [task for task in todo if task.number not in alone]
    with _bar(options, "compile", "records", total, done) as bar, LocalExecutor(1) as apart:
        for one, tasks in ((apart, suspects), (engine, rest)):
            for task, _ in one.map(job, tasks):
                bar.update(len(task.offsets))


def _earlier(inputs: Inputs, finished: Manifest | None) -> EarlierSet | None:
    """The existing set of this name as a source of Examples, for the inputs that are unchanged."""
    try:
        manifest = load_manifest(inputs.options.output)
    except (ConfigError, DataError):
        return None
    if manifest.packing.get("inputs") == inputs.digest and finished is None:
        return None  # it is damaged
    earlier = EarlierSet.matching(inputs.options.output, manifest, inputs.keys)
    if earlier is not None:
        log.info(
            "%s: Examples of %s are taken from it",
            inputs.options.output,
            counted(len(earlier.sources), "unchanged file"),
        )
    return earlier


def _sources(inputs: Inputs, chunks: Sequence[ChunkTask]) -> list[SourceCounts]:
    """Counts of each file's records.

    Raises:
        DataError: nothing can be used, or too much of a source is rejected.
    """
    read: Counter[int] = Counter()
    codes = [Counter[str]() for _ in inputs.files]
    for task in chunks:
        read[task.file] += len(task.offsets)
    notes = count_notes(inputs.work, chunks)
    for file, reject in _rejects(inputs, chunks):
        codes[file][reject.code] += 1
    sources = [
        SourceCounts(
            name=file.name,
            files=(file.written,),
            read=read[number],
            used=read[number] - codes[number].total(),
            rejected=dict(sorted(codes[number].items())),
            tags_as_text=notes[number][TAG_AS_TEXT] if number in notes else 0,
            key=inputs.keys[number],
        )
        for number, file in enumerate(inputs.files)
    ]
    beyond = rejects.too_many(sources, inputs.options.max_rejected)
    if beyond or not any(source.used for source in sources):
        raise _refused(inputs, chunks, sources, beyond)
    return sources


def _refused(
    inputs: Inputs, chunks: Sequence[ChunkTask], sources: Sequence[SourceCounts], beyond: Sequence[SourceCounts]
) -> DataError:
    """The error of a refused run; it keeps a file that lists the rejected records."""
    limit, names = inputs.options.max_rejected, {source.name for source in beyond}
    shown: list[str] = []
    for _, one in _rejects(inputs, chunks):
        if len(shown) < 3 and (not names or one.source in names):
            shown.append(f"{one.source}, record {one.line}: {one.code}: {one.message}")
    none = not any(source.used for source in sources)
    what = f" none of {counted(sum(source.read for source in sources), 'record')} can be used." if none else ""
    if not beyond:
        shutil.rmtree(inputs.work)
        return DataError(f"{inputs.options.data_config}:{what} {' '.join(shown)} Nothing is written.")
    listed = inputs.work / "rejects.jsonl"
    write_rejects(listed, (reject for _, reject in _rejects(inputs, chunks)))
    return DataError(
        f"{inputs.options.data_config}:{what} {'; '.join(map(rejects.describe, beyond))}, more than --max-rejected "
        f"{rejects.MAX_REJECTED if limit is None else limit:g} allows. For instance {' '.join(shown)} Nothing is "
        f"published; {listed} holds every rejected record. Repair them, or go on with --resume and a higher "
        "--max-rejected."
    )


def _rejects(inputs: Inputs, chunks: Iterable[ChunkTask]) -> Iterator[tuple[int, Reject]]:
    """(number of the file, rejected record), in order; read from the intermediate shards each time."""
    for task in chunks:
        file = inputs.files[task.file]
        for line, code, message in ChunkFile(chunk_path(inputs.work, task.number)).rejects:
            yield task.file, Reject(source=file.name, line=line, code=code, message=f"{file.written}: {message}")


def _write(inputs: Inputs, chunks: Sequence[ChunkTask], sources: Sequence[SourceCounts], engine: Executor) -> Manifest:
    options = inputs.options
    try:
        plan = Plan(inputs.work)
    except FileNotFoundError:
        table = EntryTable(inputs.work)
        for task in chunks:
            table.add(task.number, ChunkFile(chunk_path(inputs.work, task.number)), task.file)
        plan = table.shuffled(options.seq_length, options.seed)
    notes = count_notes(inputs.work, chunks)  # the work folder goes once the set is published
    with _bar(options, "write", "samples", plan.totals["samples"], 0) as bar:
        manifest = write_set(
            plan,
            inputs.prefix,
            inputs.info,
            sources,
            (reject for _, reject in _rejects(inputs, chunks)),
            engine=engine,
            progress=bar.update,
        )
    for source in manifest.sources:
        if source.cleaned:
            log.info("%s: %s lost leading line breaks", source.name, counted(source.cleaned, "answer"))
        if source.dropped:
            log.info("%s: %s dropped by its fixes", source.name, counted(source.dropped, "turn was", "turns were"))
    for number, found in notes.items():
        for line in describe_notes(inputs.files[number].name, found):
            log.warning("%s", line)
    return manifest


def _bar(options: Options, name: str, unit: str, total: int, done: int) -> tqdm[Any]:
    return tqdm(total=total, initial=done, unit=f" {unit}", desc=name, disable=not options.progress, mininterval=0.5)


def _finished(inputs: Inputs) -> Manifest | None:
    """The existing set of this name, if it is whole and has the same inputs."""
    from megatron_vita.data.shards.reader import ShardSet  # imports torch

    try:
        manifest = load_manifest(inputs.options.output)
        if manifest.packing.get("inputs") != inputs.digest:
            return None
        ShardSet(inputs.options.output).verify()
    except (ConfigError, DataError):
        return None
    return manifest
