"""Reuses Examples of an earlier set: unchanged datasets of a grown mix are not compiled again.

A dataset of both sets counts as unchanged if its key is the same (`source_key`): data file, form, media folder and
settings. Pictures and videos are assumed unchanged. Rejected records are always compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_vita.data.example import Example, MediaItem, TileSlot
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.writer.intermediate import Body, ChunkWriter, Region
from megatron_vita.data.sources.mix import MixFile
from megatron_vita.layout import Int64


def source_key(file: MixFile, content: str, settings: Mapping[str, Any]) -> str:
    """Digest of all inputs of a dataset's Examples except the bytes of its media. It is part of a set's digest, so it
    does not depend on where data and media lie, only on the mix.

    Args:
        file: its form, and where its media lie.
        content: SHA-256 of the data file.
        settings: of the run.
    """
    row, media = file.row, file.media
    archives = [os.path.relpath(archive, media.root) for archive in media.archives]
    rule = [media.place, archives, media.resolve, media.rewrite, media.frames, media.frame_rate]
    described = [content, row.form, rule, settings]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class EarlierSet:
    """An earlier set, and the files of the new mix whose Examples it holds."""

    prefix: str
    sources: Mapping[int, int]
    """Number of the file in the new mix -> source in the earlier set."""

    @classmethod
    def matching(cls, prefix: str, manifest: Manifest, keys: list[str]) -> EarlierSet | None:
        """Match a set with a mix by the keys of the mix's files; None if they have none in common."""
        numbers = {  # how often a tag is text is not known record by record
            source.key: number
            for number, source in enumerate(manifest.sources)
            if source.key and not source.tags_as_text
        }
        sources = {number: numbers[key] for number, key in enumerate(keys) if key in numbers}
        return cls(prefix, sources) if sources else None

    def open(self) -> _Open:
        """Open it in this process."""
        return _Open(self)


class _Open:
    """The earlier set, opened for reading."""

    def __init__(self, earlier: EarlierSet) -> None:
        from megatron_vita.data.shards.reader import ShardSet  # imports torch

        self._sources = earlier.sources
        self._shards = ShardSet(earlier.prefix)
        self._lines = lru_cache(maxsize=4)(self._index)
        self._pack = lru_cache(maxsize=2)(lambda pack: (self._shards.tokens(pack), self._shards.labels(pack)))

    def _index(self, source: int) -> tuple[Int64, Int64]:
        """Lines of a source, ascending, and the sample that each is."""
        rows = np.flatnonzero(self._shards.samples["source"] == source)
        lines = self._shards.samples["line"][rows]
        order = np.argsort(lines, kind="stable")
        return lines[order], rows[order]

    def find(self, file: int, line: int) -> int | None:
        """The sample that holds a record, if there is one."""
        if file not in self._sources:
            return None
        lines, rows = self._lines(self._sources[file])
        place = int(np.searchsorted(lines, line))
        return int(rows[place]) if place < len(lines) and lines[place] == line else None

    def copy(self, sample: int, line: int, writer: ChunkWriter) -> None:
        """Write a sample of the set to an intermediate shard; its media stay where they are.

        Raises:
            DataError: the set is damaged there.
        """
        shards = self._shards
        pack = shards.pack_of_sample(sample)
        record = shards.samples[sample]
        start = int(shards.sample_lengths(pack)[: sample - shards.pack_samples(pack).start].sum())
        tokens, labels = (part[start : start + int(record["length"])] for part in self._pack(pack))
        tiles = shards.sample_tiles(sample)
        first = int(tiles["media"][0]) if len(tiles) else 0
        columns = ("first_token", "media", "row", "col", "rows", "cols", "thumbnail")
        slots = tuple(
            TileSlot(token - start, medium - first, row, col, rows, cols, bool(thumbnail))
            for token, medium, row, col, rows, cols, thumbnail in tiles[list(columns)].tolist()
        )
        _, ones = np.unique(tiles["media"], return_index=True)
        media = tuple(MediaItem(b"", int(t["width"]), int(t["height"]), bool(t["frame"])) for t in tiles[ones])
        bodies: list[Body] = []
        for item in tiles["media"][ones].tolist():
            offset, size, crc = shards.media_place(item)
            bodies.append(Region(f"{shards.prefix}.media.bin", offset, size, crc32=crc))
        writer.add(
            line,
            Example(tokens, labels, slots, media),
            bodies,
            shortened=bool(record["shortened"]),
            cleaned=int(record["cleaned"]),
            dropped=int(record["dropped"]),
        )
