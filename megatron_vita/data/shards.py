"""The packed format: its writer and, facing it, its reader.

Files behind a prefix, all offsets 64-bit:

    tokens.{bin,idx}  labels.{bin,idx}   megatron-core's indexed container, int32; sequence = Example, document = pack
    media.{bin,idx}                      the same, uint8; sequence = picture or frame, document = the items of one pack
    tiles.npy  samples.npy               tables of TILE and SAMPLE records, in pack order
    rejects.jsonl                        what is not in the set, and why
    json                                 the manifest, published last: without it there is no set

Topology-free: nothing here depends on a parallel layout, a micro-batch or a number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.manifest import Manifest, Reject, SourceCounts, TokenizerInfo, image_block, load_manifest
from megatron_vita.data.records import (
    MEDIA_SUFFIXES,
    REFERENCE,
    SAMPLE,
    SUFFIXES,
    TILE,
    GrowingTable,
    file_info,
    sample_cost,
    starts,
)
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.layout import Int64

Int32 = npt.NDArray[np.int32]


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


class ShardSet:
    """A published shard set, memory-mapped: opening reads the manifest, the indexes and file sizes, no data.

    Arrays that are handed out are copies: they outlive the set.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a set.

        Args:
            prefix: what the writer was given.

        Raises:
            ConfigError: there is no such set.
            DataError: a file is missing, has another size than the manifest says, or does not fit the others.
        """
        self.prefix = Path(prefix)
        self.manifest = load_manifest(prefix)
        self.verify(full=False)
        try:
            self._tokens = IndexedDataset(f"{prefix}.tokens")
            self._labels = IndexedDataset(f"{prefix}.labels")
            self.samples: npt.NDArray[Any] = np.load(f"{prefix}.samples.npy")
            self._media = None if self.manifest.media == "none" else IndexedDataset(f"{prefix}.media")
            self._tiles = None if self._media is None else np.load(f"{prefix}.tiles.npy", mmap_mode="r")
            intact = self._consistent()
        except (AssertionError, ValueError, KeyError, OSError, EOFError):  # what the two libraries raise on damage
            intact = False
        if not intact:
            self.verify(full=True)  # names the file
            raise DataError(f"{prefix}: the files do not fit together. {_REMEDY}")

    def __len__(self) -> int:
        return self.num_packs

    @property
    def num_packs(self) -> int:
        """Packs of the set."""
        return int(self.manifest.totals["packs"])

    @property
    def num_samples(self) -> int:
        """Examples of the set."""
        return int(self.manifest.totals["samples"])

    @property
    def num_tiles(self) -> int:
        """Tiles of the set."""
        return int(self.manifest.totals["tiles"])

    @cached_property
    def spec(self) -> PreprocessSpec:
        """The settings that cut the pictures into tiles."""
        return self.manifest.spec

    def verify(self, full: bool = True) -> None:
        """Prove every file to be the one that was written.

        Args:
            full: read everything and compare SHA-256 digests; otherwise only look for files of the right size.

        Raises:
            DataError: naming the first file that is missing or differs.
        """
        for suffix, info in self.manifest.files.items():
            path = Path(f"{self.prefix}.{suffix}")
            try:
                size = path.stat().st_size
            except OSError:
                raise DataError(f"{path} is missing. {_REMEDY}") from None
            if size != info["bytes"]:
                raise DataError(f"{path} has {size} bytes, the manifest says {info['bytes']}. {_REMEDY}")
            if full and file_info(path)["sha256"] != info["sha256"]:
                raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's. {_REMEDY}")

    @cached_property
    def _pack_bounds(self) -> Int64:
        """First sample of each pack, and the number of samples; `[packs + 1]`."""
        return np.array(self._tokens.document_indices, dtype=np.int64)

    @cached_property
    def _token_starts(self) -> Int64:
        """First token of each sample, counted over the whole set, and the number of tokens; `[samples + 1]`."""
        return starts(self.samples["length"])

    @cached_property
    def _tile_starts(self) -> Int64:
        """First row of the tiles file of each sample, and the number of rows; `[samples + 1]`."""
        return starts(self.samples["tiles"])

    def pack_samples(self, pack: int) -> range:
        """Rows of the samples file that one pack holds, in order."""
        return range(int(self._pack_bounds[pack]), int(self._pack_bounds[pack + 1]))

    def pack_of_sample(self, sample: int) -> int:
        """The pack that holds one sample."""
        return int(np.searchsorted(self._pack_bounds, sample, side="right")) - 1

    def sample_lengths(self, pack: int) -> Int64:
        """Tokens of each Example of one pack, `[samples]`."""
        rows = self.pack_samples(pack)
        return np.array(self.samples["length"][rows.start : rows.stop])

    def pack_length(self, pack: int) -> int:
        """Tokens of one pack, without padding."""
        rows = self.pack_samples(pack)
        return int(self._token_starts[rows.stop] - self._token_starts[rows.start])

    def tokens(self, pack: int, positions: Int64 | slice = slice(None)) -> Int32:
        """Token ids of one pack at some of its positions, `[n]`; only the pages they lie on are read."""
        return self._read(self._tokens, pack, positions)

    def labels(self, pack: int, positions: Int64 | slice = slice(None)) -> Int32:
        """Labels of one pack at some of its positions, `[n]`."""
        return self._read(self._labels, pack, positions)

    def pack_tiles(self, pack: int) -> range:
        """Rows of the tiles file that belong to one pack."""
        rows = self.pack_samples(pack)
        return range(int(self._tile_starts[rows.start]), int(self._tile_starts[rows.stop]))

    def tiles(self, rows: range | Int64) -> npt.NDArray[Any]:
        """Records of the tiles file (`TILE`)."""
        if self._tiles is None:
            return np.zeros(0, dtype=TILE)
        return np.array(self._tiles[rows.start : rows.stop] if isinstance(rows, range) else self._tiles[rows])

    def sample_of_tile(self, rows: Int64) -> Int64:
        """The sample that each tile belongs to, `[n]`."""
        return np.searchsorted(self._tile_starts, rows, side="right").astype(np.int64) - 1

    def media_bytes(self, item: int) -> bytes:
        """One picture or frame, encoded as it was found.

        Raises:
            DataError: the set refers to a file that is missing or no longer the same.
        """
        if self._media is None:
            raise DataError(f"{self.prefix} is a set without media; there is no item {item}.")
        index = self._media.index
        data = self._media.bin_reader.read(
            dtype=np.uint8, count=int(index.sequence_lengths[item]), offset=int(index.sequence_pointers[item])
        ).tobytes()
        return self._referenced(data) if data.startswith(REFERENCE) else data

    def pack_costs(self, reset: bool) -> Int64:
        """Work of each pack that differs between packs, `[packs]`, in the unit of `sample_cost`.

        Args:
            reset: attention restarts at every sample; otherwise a pack is one document.
        """
        first = self._pack_bounds[:-1]
        if reset:
            return np.add.reduceat(self.samples["cost"], first)
        lengths = np.add.reduceat(self.samples["length"], first)
        tiles = np.add.reduceat(self.samples["tiles"], first)
        return sample_cost(lengths, tiles, self.manifest.tokens_per_tile)

    def _read(self, dataset: IndexedDataset, pack: int, positions: Int64 | slice) -> Int32:
        first = self.pack_samples(pack).start
        whole = dataset.bin_reader.read(
            dtype=np.int32, count=self.pack_length(pack), offset=int(dataset.index.sequence_pointers[first])
        )
        return np.array(whole[positions])

    def _referenced(self, record: bytes) -> bytes:
        info = json.loads(record[len(REFERENCE) :].decode("utf-8", "surrogateescape"))
        path = self.prefix.parent / info["path"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}, to which {self.prefix} refers, cannot be read: {error}") from None
        if len(data) != info["bytes"] or hashlib.sha256(data).hexdigest() != info["sha256"]:
            raise DataError(f"{path} is not the file that {self.prefix} refers to. Restore it, or preprocess again.")
        return data

    def _consistent(self) -> bool:
        totals = self.manifest.totals
        bounds = np.asarray(self._tokens.document_indices)
        return (
            self.samples.dtype == SAMPLE
            and len(self.samples) == len(self._tokens) == len(self._labels) == totals["samples"]
            and len(bounds) == totals["packs"] + 1
            and np.array_equal(bounds, self._labels.document_indices)
            and np.array_equal(self._tokens.sequence_lengths, self.samples["length"])
            and np.array_equal(self._labels.sequence_lengths, self.samples["length"])
            and int(self.samples["tiles"].sum()) == totals["tiles"]
            and (self._tiles is None) == (totals["tiles"] == 0 and totals["media"] == 0)
            and (self._tiles is None or (self._tiles.dtype == TILE and len(self._tiles) == totals["tiles"]))
            and (self._media is None or len(self._media) == totals["media"])
        )


_REMEDY = "Copy the set again, or preprocess again."
