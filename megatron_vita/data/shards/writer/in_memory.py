"""A shard set from Examples in memory. (compile/run.py makes one from a data mix, in many processes.)"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.example import Example
from megatron_vita.data.shards.format import starts
from megatron_vita.data.shards.manifest import (
    Manifest,
    Reject,
    SetInfo,
    SourceCounts,
    TokenizerInfo,
    check_example,
    reference_record,
)
from megatron_vita.data.shards.writer.intermediate import Body, ChunkFile, ChunkWriter
from megatron_vita.data.shards.writer.plan import EntryTable, chunk_path
from megatron_vita.data.shards.writer.publish import work_folder, write_set
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError


class ShardWriter:
    """Writes a shard set from packs of Examples in memory. (compile/run.py makes them in many processes.)

    The same packs give the same bytes. Used as a context manager it removes what it wrote when the block fails,
    and an earlier set under the same prefix stays as it was until `finish`.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        spec: PreprocessSpec,
        seq_length: int,
        tokenizer: TokenizerInfo,
        template_sha256: str,
        media: str = "embed",
        packing: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the work folder; the set's folder is made. The arguments are those of `SetInfo`, and:

        Args:
            prefix: folder and name of the set, without any suffix.
        """
        if media not in ("embed", "reference"):
            raise ConfigError(f"media={media!r}: choose embed or reference.")
        self.prefix = Path(prefix)
        self._info = SetInfo(
            spec=spec,
            seq_length=seq_length,
            tokenizer=tokenizer,
            template_sha256=template_sha256,
            media=media,
            packing=dict(packing or {}),
        )
        self._work = work_folder(self.prefix)
        shutil.rmtree(self._work, ignore_errors=True)
        chunk_path(self._work, 0).parent.mkdir(parents=True)
        self._chunk = ChunkWriter(chunk_path(self._work, 0))
        self._origins: list[int] = []
        self._packs: list[int] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunk.abort()
        shutil.rmtree(self._work, ignore_errors=True)

    def add_pack(
        self,
        examples: Sequence[Example],
        origins: Sequence[tuple[int, int]],
        references: Sequence[Sequence[Path | None]] | None = None,
    ) -> None:
        """Append one pack.

        Args:
            examples: its Examples in order; together at most seq_length tokens.
            origins: (index into the manifest's sources, record number) of each.
            references: with `media="reference"`, for each Example and media item the file that holds exactly these
                bytes, or None to embed them (video frames).

        Raises:
            DataError: the Examples break the format's rules; nothing of the pack was written.
        """
        tokens = sum(len(example.tokens) for example in examples)
        if not examples or len(origins) != len(examples) or tokens > self._info.seq_length:
            raise DataError(
                f"pack {len(self._packs)}: {len(examples)} Examples with {len(origins)} origins and {tokens} tokens; a "
                f"pack takes at least one Example and at most {self._info.seq_length} tokens."
            )
        for example, (source, line) in zip(examples, origins, strict=True):
            check_example(example, self._info, f"pack {len(self._packs)}, sample {source}:{line}")
        for number, (example, (source, line)) in enumerate(zip(examples, origins, strict=True)):
            paths = references[number] if references else [None] * len(example.media)
            bodies: list[Body] = [
                item.data if path is None else reference_record(item, path, self.prefix.parent)
                for item, path in zip(example.media, paths, strict=True)
            ]
            self._chunk.add(line, example, bodies)
            self._origins.append(source)
        self._packs.append(len(examples))

    def finish(self, sources: Sequence[SourceCounts], rejects: Iterable[Reject] = ()) -> Manifest:
        """Write the set and publish it.

        Args:
            sources: counts of each dataset, in the order that `origins` refer to; tokens and tiles are filled in here.
            rejects: every rejected record.

        Raises:
            DataError: no pack was added, or the counts do not add up.
        """
        if not self._packs:
            raise DataError(f"{self.prefix}: no sample was left to pack. The rejects say why; nothing was written.")
        self._chunk.publish()
        table = EntryTable(self._work)
        table.add(0, ChunkFile(chunk_path(self._work, 0)), np.array(self._origins))
        plan = table.as_given(starts(np.array(self._packs, dtype=np.int64)))
        return write_set(plan, self.prefix, self._info, sources, rejects)
