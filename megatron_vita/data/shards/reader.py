"""The packed format, and its reader. (Its writer is writer/publish.py.)

Files behind a prefix, all offsets 64-bit:

    tokens.{bin,idx}  labels.{bin,idx}   megatron-core's indexed container, int32; sequence = Example, document = pack
    media.{bin,idx}                      the same, uint8; sequence = picture or frame, document = the items of one pack
    tiles.npy  samples.npy               tables of TILE and SAMPLE records, in pack order
    crc32.npy                            uint32 checksums: tokens of each pack, labels of each pack, each medium
    rejects.jsonl                        what is not in the set, and why
    json                                 the manifest, published last: without it there is no set

Topology-free: nothing here depends on a parallel layout, a micro-batch or a number of workers.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.shards.format import HEADER, REFERENCE, SAMPLE, SMALL_SUFFIXES, TILE, attention_pairs, starts
from megatron_vita.data.shards.manifest import load_manifest
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import DataError
from megatron_vita.files import exhausted, file_info
from megatron_vita.layout import Int64

Int32 = npt.NDArray[np.int32]


class ShardSet:
    """A published shard set, memory-mapped: opening proves sizes, manifest, indexes and tables, and reads no data.

    Data are proven pack by pack and picture by picture, when they are read. Arrays that are handed out are copies: they
    outlive the set.
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
            self._tokens = _open_index(f"{prefix}.tokens", np.int32)
            self._labels = _open_index(f"{prefix}.labels", np.int32)
            self.samples: npt.NDArray[Any] = np.load(f"{prefix}.samples.npy")
            self._media = None if self.manifest.media == "none" else _open_index(f"{prefix}.media", np.uint8)
            self._tiles = None if self._media is None else np.load(f"{prefix}.tiles.npy", mmap_mode="r")
            self._crc: npt.NDArray[np.uint32] = np.load(f"{prefix}.crc32.npy", mmap_mode="r")
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # numpy's reader of headers raises nearly anything on damage, tokenize.TokenError too
            self.verify(full=True)  # names the file
            raise DataError(f"{prefix}: cannot be opened ({type(error).__name__}: {error}). {_REMEDY}") from error
        if not self._consistent():
            self.verify(full=True)
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
            full: compare the SHA-256 of every file; otherwise that of indexes and tables, and the others' sizes.

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
            if (full or suffix in SMALL_SUFFIXES) and file_info(path)["sha256"] != info["sha256"]:
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
        """Token ids of one pack at some of its positions, `[n]`.

        Raises:
            DataError: the pack is damaged.
        """
        return self._read("tokens", self._tokens, pack, positions, int(self._crc[pack]))

    def labels(self, pack: int, positions: Int64 | slice = slice(None)) -> Int32:
        """Labels of one pack at some of its positions, `[n]`.

        Raises:
            DataError: the pack is damaged.
        """
        return self._read("labels", self._labels, pack, positions, int(self._crc[self.num_packs + pack]))

    def pack_tiles(self, pack: int) -> range:
        """Rows of the tiles file that belong to one pack."""
        rows = self.pack_samples(pack)
        return range(int(self._tile_starts[rows.start]), int(self._tile_starts[rows.stop]))

    def tiles(self, rows: range | Int64) -> npt.NDArray[Any]:
        """Records of the tiles file (`TILE`)."""
        if self._tiles is None:
            return np.zeros(0, dtype=TILE)
        return np.array(self._tiles[rows.start : rows.stop] if isinstance(rows, range) else self._tiles[rows])

    def sample_tiles(self, sample: int) -> npt.NDArray[Any]:
        """Records of the tiles file of one sample."""
        return self.tiles(range(int(self._tile_starts[sample]), int(self._tile_starts[sample + 1])))

    def sample_of_tile(self, rows: Int64) -> Int64:
        """The sample that each tile belongs to, `[n]`."""
        return np.searchsorted(self._tile_starts, rows, side="right").astype(np.int64) - 1

    def media_bytes(self, item: int) -> bytes:
        """One picture or frame, encoded as it was found.

        Raises:
            DataError: it is damaged, or the set refers to a file that is missing or no longer the same.
        """
        offset, size, crc = self.media_place(item)
        assert self._media is not None
        data = self._media.bin_reader.read(dtype=np.uint8, count=size, offset=offset).tobytes()
        if zlib.crc32(data) != crc:
            raise DataError(f"{self.prefix}.media.bin is damaged: item {item} has another checksum. {_REMEDY}")
        return self._referenced(data) if data.startswith(REFERENCE) else data

    def media_place(self, item: int) -> tuple[int, int, int]:
        """(offset in the media file, bytes, checksum) of one item."""
        if self._media is None:
            raise DataError(f"{self.prefix} is a set without media; there is no item {item}.")
        index = self._media.index
        crc = int(self._crc[2 * self.num_packs + item])
        return int(index.sequence_pointers[item]), int(index.sequence_lengths[item]), crc

    def pack_work(self, reset: bool) -> Int64:
        """Work of each pack that differs between packs, `[packs, 2]`: query-key pairs of the decoder, and tiles.

        Args:
            reset: attention restarts at every sample; otherwise a pack is one document.
        """
        first = self._pack_bounds[:-1]
        lengths, tiles = self.samples["length"], self.samples["tiles"]
        if reset:
            pairs = np.add.reduceat(attention_pairs(lengths), first)
        else:
            pairs = attention_pairs(np.add.reduceat(lengths, first))
        return np.stack([pairs, np.add.reduceat(tiles, first)], axis=1)

    def _read(self, name: str, dataset: Any, pack: int, positions: Int64 | slice, crc: int) -> Int32:
        first = self.pack_samples(pack).start
        whole = dataset.bin_reader.read(
            dtype=np.int32, count=self.pack_length(pack), offset=int(dataset.index.sequence_pointers[first])
        )
        if zlib.crc32(whole) != crc:
            raise DataError(f"{self.prefix}.{name}.bin is damaged: pack {pack} has another checksum. {_REMEDY}")
        return np.array(whole[positions])

    def _referenced(self, record: bytes) -> bytes:
        info = json.loads(record[len(REFERENCE) :].decode("utf-8", "surrogateescape"))
        path = self.prefix.parent / info["path"]
        try:
            with path.open("rb") as stream:
                stream.seek(info.get("offset", 0))
                data = stream.read(info["bytes"]) if "offset" in info else stream.read()
        except OSError as error:
            if exhausted(error):
                raise
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
            and self._crc.dtype == np.uint32
            and len(self._crc) == 2 * totals["packs"] + totals["media"]
        )


def _open_index(prefix: str, dtype: type[np.integer[Any]]) -> Any:
    """Open an indexed container whose index describes its data file from end to end: a reader trusts an index, and a
    wrong pointer would give other data.

    Raises:
        ValueError: the index does not fit the data file.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset  # imports torch

    header = np.fromfile(f"{prefix}.idx", dtype=HEADER, count=1)[0]
    sequences, documents = int(header["sequences"]), int(header["documents"])
    size = HEADER.itemsize + 12 * sequences + 8 * documents
    if (
        (header["magic"], header["version"]) != (b"MMIDIDX", 1)
        or DType.dtype_from_code(int(header["code"])) is not dtype
        or size != Path(f"{prefix}.idx").stat().st_size
    ):
        raise ValueError(f"{prefix}.idx: bad header")
    dataset = IndexedDataset(prefix)
    end = 0
    for start in range(0, sequences, _INDEX_STRIDE):
        lengths = dataset.index.sequence_lengths[start : start + _INDEX_STRIDE].astype(np.int64)
        ends = end + np.cumsum(lengths) * np.dtype(dtype).itemsize
        if lengths.min() < 0 or not np.array_equal(
            dataset.index.sequence_pointers[start : start + _INDEX_STRIDE], np.append(end, ends[:-1])
        ):
            raise ValueError(f"{prefix}.idx: pointers that do not follow from the lengths")
        end = int(ends[-1])
    if end != Path(f"{prefix}.bin").stat().st_size:
        raise ValueError(f"{prefix}.idx: describes {end} bytes")
    return dataset


_INDEX_STRIDE = 1 << 20
"""Sequences looked at together."""
_REMEDY = "Copy the set again, or preprocess again."
