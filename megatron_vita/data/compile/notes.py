"""Notes reported at the end of a run, besides rejected records: fields that nothing reads, tags kept as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_vita.data.compile.job import ChunkTask
from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.plan import chunk_path
from megatron_vita.data.sources.to_sample import TAG_AS_TEXT

_LISTED = 8


def count_notes(work: Path, chunks: Iterable[ChunkTask]) -> dict[int, Counter[str]]:
    """Number of a file in the mix -> each note of its records, and the number of records that have it."""
    notes: dict[int, Counter[str]] = {}
    for task in chunks:
        notes.setdefault(task.file, Counter()).update(ChunkFile(chunk_path(work, task.number)).notes)
    return notes


def describe_notes(source: str, notes: Counter[str]) -> list[str]:
    """One line for each kind of note of a source."""
    lines = []
    if notes[TAG_AS_TEXT]:
        lines.append(
            f"{source}: {counted(notes[TAG_AS_TEXT], 'record spells', 'records spell')} `<image>` or `<video>` in a "
            "question without such a medium; the tag is taught as text"
        )
    fields = [f"`{name}` ({counted(count, 'record')})" for name, count in notes.most_common() if name != TAG_AS_TEXT]
    if fields:
        more = f" and {len(fields) - _LISTED} more" if len(fields) > _LISTED else ""
        lines.append(
            f"{source}: nothing reads {', '.join(fields[:_LISTED])}{more}; what they say is not taught. If that is "
            "right, list them under `fields: {ignore: [...]}` in the data mix"
        )
    return lines
