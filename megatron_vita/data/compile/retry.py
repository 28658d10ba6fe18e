"""With `--resume`, retries records that were rejected for their media, which may have been fetched since.

A record is retried by itself. Chunks of which a record has another outcome now are compiled again, so that the set is
the same as if the media had been there from the start.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_vita.data.compile.engines import Executor, LocalExecutor
from megatron_vita.data.compile.inputs import Inputs
from megatron_vita.data.compile.job import ChunkTask, RetryJob
from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.plan import chunk_path

_COSTLY = ("media_crash", "video_timeout", "video_memory")

Outcomes = dict[int, tuple[str, str]]
"""Record number -> (error code, message) with which it was rejected for its media."""

log = logging.getLogger(__name__)


def forget_outdated(inputs: Inputs, chunks: Sequence[ChunkTask], engine: Executor) -> None:
    """Remove intermediate shards of a killed run of which a rejected record can be used now, and what depends on them.

    Args:
        inputs: of the run.
        chunks: all of them.
        engine: runs the retries.
    """
    work = inputs.work
    retries: list[ChunkTask] = []
    for task in chunks:
        if chunk_path(work, task.number).exists():
            rejects = ChunkFile(chunk_path(work, task.number)).rejects
            retries += _of_chunk(task, {line: (code, message) for line, code, message in rejects if _may_change(code)})
    outdated = _changed(inputs, retries, engine)
    if outdated:
        log.info(
            "media of rejected records have come: %s compiled again", counted(len(outdated), "chunk is", "chunks are")
        )
        for name in ("plan", "done", "out"):
            shutil.rmtree(work / name, ignore_errors=True)
        (work / "created").unlink(missing_ok=True)
        for number in outdated:
            chunk_path(work, number).unlink()


def rejected_for_media(inputs: Inputs) -> dict[int, Outcomes]:
    """Number of a file of the mix -> its records that the finished set has rejected for their media."""
    numbers = {file.name: number for number, file in enumerate(inputs.files)}
    found: dict[int, Outcomes] = {}
    with Path(f"{inputs.prefix}.rejects.jsonl").open(encoding="utf-8") as stream:
        for one in map(json.loads, stream):
            if _may_change(one["code"]):
                number = numbers[one["source"]]
                message = one["message"].removeprefix(f"{inputs.files[number].written}: ")
                found.setdefault(number, {})[one["line"]] = (one["code"], message)
    return found


def any_changed(
    inputs: Inputs, chunks: Sequence[ChunkTask], rejected: Mapping[int, Outcomes], engine: Executor
) -> bool:
    """Whether any of the rejected records has another outcome now."""
    retries = [one for task in chunks for one in _of_chunk(task, rejected.get(task.file, {}))]
    return bool(_changed(inputs, retries, engine))


def _may_change(code: str) -> bool:
    """Whether new media may change the outcome of an error code. Codes that are costly to reproduce are not retried."""
    return code.startswith(("media_", "video_", "path_")) and code not in _COSTLY


def _of_chunk(task: ChunkTask, outcomes: Outcomes) -> list[ChunkTask]:
    """A task for those records of a chunk that were rejected; none if there are none."""
    lines = task.offsets[:, 0].tolist()
    rows = [row for row, line in enumerate(lines) if line in outcomes]
    if not rows:
        return []
    return [ChunkTask(task.number, task.file, task.offsets[rows], outcomes=tuple(outcomes[lines[row]] for row in rows))]


def _changed(inputs: Inputs, retries: Sequence[ChunkTask], engine: Executor) -> list[int]:
    """Numbers of the chunks of which a rejected record has another outcome now."""
    if not retries:
        return []
    with LocalExecutor(1) as apart:  # what was not there before may kill its process
        chosen = apart if inputs.options.workers == 1 else engine
        return [task.number for task, changed in chosen.map(RetryJob.of(inputs), retries) if changed]
