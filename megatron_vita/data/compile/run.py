"""Compile a data mix into a packed shard set: read, compile in many processes, pack, write in many processes, publish.

In the first phase records become Examples, chunk by chunk, spooled by the processes that make them. This process packs
their lengths. Then every place in every file is known, and in the second phase processes write ranges of packs side by
side, pictures straight from where they lie. What comes out depends on the mix, the settings and the seed alone, whoever
did the work and however often it was cut short: what is finished stays in the work folder until the set is published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vita import __version__
from megatron_vita.data.compile.engines import Executor, LocalExecutor, open_executor
from megatron_vita.data.compile.job import ChunkJob, ChunkTask
from megatron_vita.data.compile.options import Options
from megatron_vita.data.compile.record import Rules
from megatron_vita.data.compile.reuse import EarlierSet, source_key
from megatron_vita.data.media.video.open import decoder_name
from megatron_vita.data.shards.manifest import Manifest, Reject, SetInfo, SourceCounts, TokenizerInfo, load_manifest
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.plan import EntryTable, Plan, chunk_path
from megatron_vita.data.shards.writer.publish import hold_work_folder, work_folder, write_set
from megatron_vita.data.sources.media_store import store as stores
from megatron_vita.data.sources.mix import MixFile, load_mix
from megatron_vita.data.text.tokenizer import (
    IM_END,
    PATCH,
    PATCH_CONTEXT,
    PATCH_END,
    VID,
    VID_CONTEXT,
    VID_END,
    VitaTokenizer,
)
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.files import file_info, no_room

CHUNK = 128
"""Records that a process takes at once."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A run whose settings are proven: nothing is written yet."""

    options: Options
    files: list[MixFile]
    info: SetInfo
    keys: list[str]
    """Of each file: who has the same key has the same Examples."""

    @property
    def prefix(self) -> Path:
        return Path(self.options.output)

    @property
    def work(self) -> Path:
        return work_folder(self.prefix)

    @property
    def inputs(self) -> str:
        return str(self.info.packing["inputs"])


def run(options: Options) -> Manifest:
    """Compile a mix.

    Nothing stands under the final names until all of it is written, and the manifest is published last; an earlier set
    of the same name stays whole until then. A run that is cut short leaves `DIR/.PREFIX.work`, with which `resume`
    continues; without `resume` such a folder is started over.

    Returns:
        The manifest of the set, just written or (with `resume`) found finished.

    Raises:
        ConfigError: settings, mix or tokenizer are wrong; nothing was written.
        DataError: a data file cannot be read, no record is left, more were refused than `max_rejected` allows, or the
            disk is full.
    """
    job = _prepare(options)
    try:
        return _run(job)
    except OSError as error:
        if not no_room(error):
            raise
        raise DataError(
            f"--output {job.prefix}: cannot be written ({error.strerror}). Make room and go on with --resume."
        ) from None


def _run(job: _Run) -> Manifest:
    options = job.options
    # the same chunks have the same numbers: said by whoever cuts them
    described = f"{job.inputs} {CHUNK} {__version__}"
    held = hold_work_folder(job.prefix, described, resume=options.resume)
    with held as ready, open_executor(options.engine, options.workers) as engine:
        if ready is not None:
            return ready
        if options.resume:
            finished = _finished(options.output, job.inputs)
            if finished is not None:
                log.info("%s is finished and its inputs are the same: kept", options.output)
                shutil.rmtree(job.work)
                return finished
        chunks = _chunks(job)
        _compile(job, chunks, engine)
        sources = _sources(job, chunks)
        return _write(job, chunks, sources, engine)


def _prepare(options: Options) -> _Run:
    """Read everything small and prove it, before anything is written."""
    files = load_mix(options.data_config)
    tokenizer = VitaTokenizer.load(options.tokenizer)
    if options.spec.layout == "long_vita":
        for token in (VID, VID_END, VID_CONTEXT, PATCH, PATCH_END, PATCH_CONTEXT):
            tokenizer.token_id(token)
    tokenizer.token_id(IM_END)
    open_executor(options.engine, options.workers)  # complains if ray is missing
    decoder = decoder_name(options.video_backend)
    settings: dict[str, Any] = {
        "spec": options.spec.to_dict(),
        "seq_length": options.seq_length,
        "overlong": options.overlong,
        "media": options.media,
        "verify_media": options.verify_media,
        "video_decoder": decoder,
        "video_limits": [options.video_limits.timeout, options.video_limits.memory],
        "tokenizer": tokenizer.sha256,
        "template": tokenizer.template_sha256,
    }
    with ThreadPoolExecutor(options.workers) as threads:  # hashlib frees the GIL
        contents = list(threads.map(lambda file: file_info(file.path)["sha256"], files))
    keys = [source_key(file, content, settings) for file, content in zip(files, contents, strict=True)]
    named = [[file.name, file.written, file.ratio, file.num, key] for file, key in zip(files, keys, strict=True)]
    inputs = hashlib.sha256(json.dumps([options.seed, named], sort_keys=True).encode()).hexdigest()
    info = SetInfo(
        spec=options.spec,
        seq_length=options.seq_length,
        tokenizer=TokenizerInfo(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id),
        template_sha256=tokenizer.template_sha256,
        media=options.media,
        video_decoder=decoder,
        packing={"seed": options.seed, "inputs": inputs},
    )
    return _Run(options=options, files=files, info=info, keys=keys)


def _chunks(job: _Run) -> list[ChunkTask]:
    """The records that were chosen, in runs for one process each: the same ones whoever compiles them."""
    chunks: list[ChunkTask] = []
    sources_work = job.work / "sources"
    try:
        for rule in dict.fromkeys(file.media for file in job.files):
            stores.prepare(rule, sources_work, progress=job.options.progress)
        for number, file in enumerate(job.files):
            reader = file.reader(sources_work)
            reader.prepare(progress=job.options.progress)
            chosen = file.choose(reader.index(), job.options.seed)
            parts = reader.chunks(chosen, CHUNK)
            chunks += [ChunkTask(n, number, part) for n, part in enumerate(parts, len(chunks))]
    except VitaError:
        if not (job.work / "spool").exists():  # nothing is compiled yet that could be kept
            shutil.rmtree(job.work)
        raise
    return chunks


def _compile(job: _Run, chunks: Sequence[ChunkTask], engine: Executor) -> None:
    """Every chunk that has no spool file yet."""
    options, work = job.options, job.work
    for folder in {chunk_path(work, task.number).parent for task in chunks}:
        folder.mkdir(parents=True, exist_ok=True)
    todo = [task for task in chunks if not chunk_path(work, task.number).exists()]
    compiling = ChunkJob(
        tokenizer=str(options.tokenizer),
        rules=Rules(
            spec=options.spec,
            seq_length=options.seq_length,
            overlong=options.overlong,
            verify_media=options.verify_media,
            video_limits=options.video_limits,
            video_backend=options.video_backend,
        ),
        info=job.info,
        files=job.files,
        work=work,
        sources_work=work / "sources",
        folder=job.prefix.parent,
        earlier=_earlier(job) if options.resume else None,
    )
    total = sum(len(task.places) for task in chunks)
    done = total - sum(len(task.places) for task in todo)
    # What was being compiled when a run ended may have ended it: it gets a process of its own, whose end is survived.
    suspects = [task for task in todo if compiling.marker(task.number).exists()] if options.workers == 1 else []
    alone = {task.number for task in suspects}
    rest = [task for task in todo if task.number not in alone]
    with _bar(options, "compile", "records", total, done) as bar, LocalExecutor(1) as apart:
        for one, tasks in ((apart, suspects), (engine, rest)):
            for task, _ in one.map(compiling, tasks):
                bar.update(len(task.places))


def _earlier(job: _Run) -> EarlierSet | None:
    """The set under this name as a source of Examples, if it is one of other inputs."""
    try:
        manifest = load_manifest(job.options.output)
    except (ConfigError, DataError):
        return None
    if manifest.packing.get("inputs") == job.inputs:
        return None  # the same inputs, and yet not taken as finished: it is damaged
    earlier = EarlierSet.matching(job.options.output, manifest, job.keys)
    if earlier is not None:
        log.info("%s: Examples of %d unchanged files are taken from it", job.options.output, len(earlier.sources))
    return earlier


def _sources(job: _Run, chunks: Sequence[ChunkTask]) -> list[SourceCounts]:
    """What became of each file's records.

    Raises:
        DataError: nothing can be used, or too much is refused.
    """
    read: Counter[int] = Counter()
    rejected = [Counter[str]() for _ in job.files]
    first: list[str] = []
    for task in chunks:
        read[task.file] += len(task.places)
    for file, reject in _rejects(job, chunks):
        rejected[file][reject.code] += 1
        if len(first) < 3:
            first.append(f"{reject.source}, record {reject.line}: {reject.code}: {reject.message}")
    total, refused = read.total(), sum(codes.total() for codes in rejected)
    if refused == total:
        shutil.rmtree(job.work)
        raise DataError(
            f"{job.options.data_config}: none of {total} records can be used. {' '.join(first)} Nothing is written."
        )
    if refused > job.options.max_rejected * total:
        codes = ", ".join(f"{count} {code}" for code, count in sum(rejected, Counter[str]()).most_common())
        raise DataError(
            f"{job.options.data_config}: {refused} of {total} records are refused ({codes}), more than --max-rejected "
            f"{job.options.max_rejected} allows. For instance {' '.join(first)} Mend them, or go on with --resume "
            "and a higher --max-rejected."
        )
    return [
        SourceCounts(
            name=file.name,
            files=(file.written,),
            read=read[number],
            used=read[number] - rejected[number].total(),
            rejected=dict(sorted(rejected[number].items())),
            key=job.keys[number],
        )
        for number, file in enumerate(job.files)
    ]


def _rejects(job: _Run, chunks: Sequence[ChunkTask]) -> Iterator[tuple[int, Reject]]:
    """(number of the file, refused record), in order; read from the spool files each time."""
    for task in chunks:
        file = job.files[task.file]
        for line, code, message in ChunkFile(chunk_path(job.work, task.number)).rejects:
            yield task.file, Reject(source=file.name, line=line, code=code, message=f"{file.written}: {message}")


def _write(job: _Run, chunks: Sequence[ChunkTask], sources: Sequence[SourceCounts], engine: Executor) -> Manifest:
    options = job.options
    try:
        plan = Plan(job.work)
    except FileNotFoundError:
        table = EntryTable(job.work)
        for task in chunks:
            table.add(task.number, ChunkFile(chunk_path(job.work, task.number)), task.file)
        plan = table.shuffled(options.seq_length, options.seed)
    with _bar(options, "write", "samples", plan.totals["samples"], 0) as bar:
        manifest = write_set(
            plan,
            job.prefix,
            job.info,
            sources,
            (reject for _, reject in _rejects(job, chunks)),
            engine=engine,
            progress=bar.update,
        )
    for source in manifest.sources:
        if source.cleaned:
            log.info("%s: %d answers lost leading line breaks", source.name, source.cleaned)
        if source.dropped:
            log.info("%s: %d turns were dropped by its fixes", source.name, source.dropped)
    return manifest


def _bar(options: Options, name: str, unit: str, total: int, done: int) -> tqdm[Any]:
    return tqdm(total=total, initial=done, unit=f" {unit}", desc=name, disable=not options.progress, mininterval=0.5)


def _finished(output: str, inputs: str) -> Manifest | None:
    """The set under this name, if it is whole and was made from the same inputs."""
    from megatron_vita.data.shards.reader import ShardSet  # imports torch

    try:
        manifest = load_manifest(output)
        if manifest.packing.get("inputs") != inputs:
            return None
        ShardSet(output).verify()
    except (ConfigError, DataError):
        return None
    return manifest
