"""The writer of the packed format that shards.py describes and reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.manifest import Manifest, Reject, SourceCounts, TokenizerInfo, image_block
from megatron_vita.data.records import (
    MEDIA_SUFFIXES,
    REFERENCE,
    SAMPLE,
    SUFFIXES,
    TILE,
    GrowingTable,
    file_info,
    sample_cost,
)
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError


class ShardWriter:
    """Writes a shard set, pack by pack, under temporary names; `finish` publishes it, the manifest last.

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
        """Open the temporary files; the folder is made.

        Args:
            prefix: folder and name of the set, without any suffix.
            spec: how the pictures were cut.
            seq_length: most tokens of a pack.
            tokenizer: which tokenizer made the ids, and the id that pads.
            template_sha256: digest of the chat template.
            media: `embed` or `reference` (then `add_pack` is told the pictures' paths).
            packing: further facts for the manifest's packing block (`policy`, `seed`).
        """
        if media not in ("embed", "reference"):
            raise ConfigError(f"media={media!r}: choose embed or reference.")
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._spec, self._seq_length, self._media = spec, seq_length, media
        self._tokenizer, self._template = tokenizer, template_sha256
        self._packing = {"policy": "best-fit-decreasing", "seed": 0, **(packing or {})}
        self._tokens = IndexedDatasetBuilder(str(self._partial("tokens.bin")), dtype=np.int32)
        self._labels = IndexedDatasetBuilder(str(self._partial("labels.bin")), dtype=np.int32)
        self._items = IndexedDatasetBuilder(str(self._partial("media.bin")), dtype=np.uint8)
        self._tiles = GrowingTable(self._partial("tiles.npy"), TILE)
        self._samples = GrowingTable(self._partial("samples.npy"), SAMPLE)
        self._num_packs = self._num_tokens = self._num_labels = 0
        self._by_source: dict[int, list[int]] = {}  # source -> [samples, tokens, tiles]
        self._open = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.abort()

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
        lengths = [len(example.tokens) for example in examples]
        if not examples or len(origins) != len(examples) or sum(lengths) > self._seq_length:
            raise DataError(
                f"pack {self._num_packs}: {len(examples)} Examples with {len(origins)} origins and {sum(lengths)} "
                f"tokens; a pack takes at least one Example and at most {self._seq_length} tokens."
            )
        for example, origin in zip(examples, origins, strict=True):
            self._check(example, origin)
        tokens = np.concatenate([example.tokens for example in examples]).astype(np.int32, copy=False)
        labels = np.concatenate([example.labels for example in examples]).astype(np.int32, copy=False)
        tiles = self._tile_records(examples, lengths)
        records = np.zeros(len(examples), dtype=SAMPLE)
        records["source"], records["line"] = np.array(origins, dtype=np.int64).T
        records["length"] = lengths
        records["tiles"] = [len(example.tiles) for example in examples]
        records["cost"] = sample_cost(lengths, records["tiles"], self._spec.tokens_per_tile)
        records["labels"] = [int(np.count_nonzero(example.labels != IGNORE_INDEX)) for example in examples]

        items = [
            self._item_bytes(item, references[e][m] if references else None)
            for e, example in enumerate(examples)
            for m, item in enumerate(example.media)
        ]
        self._tokens.add_document(tokens, lengths)
        self._labels.add_document(labels, lengths)
        self._items.add_document(np.frombuffer(b"".join(items), dtype=np.uint8), [len(item) for item in items])
        self._tiles.append(tiles)
        self._samples.append(records)
        self._num_packs += 1
        self._num_tokens += len(tokens)
        self._num_labels += int(records["labels"].sum())
        for record in records:
            counts = self._by_source.setdefault(int(record["source"]), [0, 0, 0])
            counts[0] += 1
            counts[1] += int(record["length"])
            counts[2] += int(record["tiles"])

    def finish(self, sources: Sequence[SourceCounts], rejects: Iterable[Reject] = ()) -> Manifest:
        """Write the indexes and the rejects, digest everything, and publish the set.

        Args:
            sources: counts of each dataset, in the order that `origins` refer to; tokens and tiles are filled in here.
            rejects: every refused record.

        Raises:
            DataError: no pack was added, or the counts do not add up.
        """
        if not self._num_packs:
            raise DataError(f"{self.prefix}: no sample was left to pack. The rejects say why; nothing was written.")
        rejected: dict[str, int] = {}
        with self._partial("rejects.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as stream:
            for reject in rejects:
                stream.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
                rejected[reject.source] = rejected.get(reject.source, 0) + 1
        sources = [self._counted(index, source, rejected) for index, source in enumerate(sources)]
        if set(self._by_source) - set(range(len(sources))):
            raise DataError(f"{self.prefix}: samples of source {max(self._by_source)}, but {len(sources)} are listed.")

        num_media = len(self._items.sequence_lengths)
        for builder, name in ((self._tokens, "tokens"), (self._labels, "labels"), (self._items, "media")):
            builder.finalize(str(self._partial(f"{name}.idx")))
        self._tiles.finish()
        self._samples.finish()
        absent = () if self._tiles.rows or num_media else MEDIA_SUFFIXES
        present = [suffix for suffix in SUFFIXES if suffix not in absent]
        for suffix in absent:
            self._partial(suffix).unlink()
        manifest = Manifest(
            seq_length=self._seq_length,
            layout=self._spec.layout,
            tokenizer=self._tokenizer,
            template_sha256=self._template,
            image=image_block(self._spec),
            video={"max_frames": self._spec.max_frames, "max_fps": self._spec.max_fps},
            packing={**self._packing, "fill": round(self._num_tokens / (self._num_packs * self._seq_length), 6)},
            media="none" if absent else self._media,
            sources=tuple(sources),
            totals={
                "packs": self._num_packs,
                "samples": self._samples.rows,
                "tokens": self._num_tokens,
                "labels": self._num_labels,
                "tiles": self._tiles.rows,
                "media": num_media,
                "read": sum(source.read for source in sources),
                "rejected": sum(sum(source.rejected.values()) for source in sources),
            },
            files={suffix: file_info(self._partial(suffix)) for suffix in present},
            digest="",
        ).sealed()
        self._publish(manifest, present, absent)
        self._open = False
        return manifest

    def abort(self) -> None:
        """Close and remove the temporary files."""
        self._open = False
        for builder in (self._tokens, self._labels, self._items):
            builder.data_file.close()
        self._tiles.abort()
        self._samples.abort()
        for suffix in (*SUFFIXES, "json"):
            self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}.partial")

    def _check(self, example: Example, origin: tuple[int, int]) -> None:
        where = f"pack {self._num_packs}, sample {origin[0]}:{origin[1]}"
        length = len(example.tokens)
        if not length or len(example.labels) != length or example.labels[-1] != IGNORE_INDEX:
            raise DataError(
                f"{where}: {length} tokens, {len(example.labels)} labels; an Example has as many labels as tokens and "
                f"its last label is {IGNORE_INDEX}."
            )
        if int(example.tokens.min()) < 0 or int(example.tokens.max()) >= self._tokenizer.vocab_size:
            raise DataError(f"{where}: token ids must lie in 0..{self._tokenizer.vocab_size - 1} (the vocabulary).")
        ends = [slot.first_token + self._spec.tokens_per_tile for slot in example.tiles]
        starts = [slot.first_token for slot in example.tiles]
        if ends and (starts[0] < 0 or ends[-1] > length or any(a > b for a, b in zip(ends, starts[1:], strict=False))):
            raise DataError(f"{where}: its tiles overlap, are out of order, or lie outside its {length} tokens.")
        if any(not 0 <= slot.media < len(example.media) for slot in example.tiles):
            raise DataError(f"{where}: a tile refers to a picture beyond its {len(example.media)}.")

    def _tile_records(self, examples: Sequence[Example], lengths: Sequence[int]) -> npt.NDArray[Any]:
        rows = []
        start, media = 0, len(self._items.sequence_lengths)
        for example, length in zip(examples, lengths, strict=True):
            for slot in example.tiles:
                item = example.media[slot.media]
                rows.append(
                    (
                        self._num_packs,
                        start + slot.first_token,
                        self._spec.tokens_per_tile,
                        media + slot.media,
                        slot.row,
                        slot.col,
                        slot.rows,
                        slot.cols,
                        int(slot.thumbnail),
                        item.width,
                        item.height,
                        int(item.frame),
                    )
                )
            start += length
            media += len(example.media)
        return np.array(rows, dtype=TILE)

    def _item_bytes(self, item: MediaItem, path: Path | None) -> bytes:
        if self._media == "embed" or path is None:
            return item.data
        record = {
            "path": os.path.relpath(path, self.prefix.parent),
            "bytes": len(item.data),
            "width": item.width,
            "height": item.height,
            "sha256": hashlib.sha256(item.data).hexdigest(),
        }
        return REFERENCE + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape")

    def _counted(self, index: int, source: SourceCounts, rejected: Mapping[str, int]) -> SourceCounts:
        used, tokens, tiles = self._by_source.get(index, [0, 0, 0])
        refused = sum(source.rejected.values())
        if source.used != used or source.read != used + refused or rejected.get(source.name, 0) != refused:
            raise DataError(
                f"{self.prefix}: the counts of {source.name} do not add up: read {source.read}, said to be used "
                f"{source.used}, packed {used}, rejected {refused}, lines of rejects {rejected.get(source.name, 0)}."
            )
        return dataclasses.replace(source, rejected=dict(source.rejected), tokens=tokens, tiles=tiles)

    def _publish(self, manifest: Manifest, present: Sequence[str], absent: Sequence[str]) -> None:
        final = Path(f"{self.prefix}.json")
        partial = self._partial("json")
        partial.write_text(manifest.dumps(), encoding="utf-8")
        for suffix in (*present, "json"):
            with self._partial(suffix).open("rb+") as stream:
                os.fsync(stream.fileno())
        final.unlink(missing_ok=True)  # from here until the last line there is no set, rather than a mixed one
        for suffix in absent:
            Path(f"{self.prefix}.{suffix}").unlink(missing_ok=True)
        for suffix in present:
            self._partial(suffix).replace(f"{self.prefix}.{suffix}")
        partial.replace(final)
