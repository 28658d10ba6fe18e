"""Writes packs at their offsets: each range of packs is written by one process, in any order, to the same bytes."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.shards.format import SAMPLE, TILE, IndexFile, npy_header, sample_cost, starts
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.plan import Plan, chunk_path
from megatron_vita.errors import DataError
from megatron_vita.files import sync_data, write_at
from megatron_vita.layout import Int64

CRC = np.dtype("<u4")
_WRITTEN = (
    *(f"{name}.{suffix}" for name in ("tokens", "labels", "media") for suffix in ("bin", "idx")),
    "tiles.npy",
    "crc32.npy",
)
_OPEN_FILES = 64
"""Intermediate shards and archives that a process holds open."""


@dataclass(frozen=True, slots=True)
class PackJob:
    """Picklable factory: makes, in any process, the function that writes one range of the plan."""

    work: Path
    tokens_per_tile: int

    def open(self) -> Callable[[int], None]:
        """The function that writes range number n."""
        return PackWriter(self).write

    def died(self, task: int, deaths: int) -> int:
        """What to do when the process that wrote a range is gone: write it again, three times at most.

        Raises:
            DataError: it never comes to its end.
        """
        if deaths >= 3:
            raise DataError(
                f"writing packs: the process was killed {deaths} times at range {task} (out of memory?). "
                "Lower --workers and run again with --resume."
            )
        return task


def out_path(work: Path, suffix: str) -> Path:
    """A file of the set before it is published."""
    return work / "out" / suffix


def done_path(work: Path, number: int) -> Path:
    """Exists once a range is written and synced."""
    return work / "done" / f"{number:06d}"


def create_files(plan: Plan, tokens_per_tile: int) -> None:
    """Create what the plan alone determines: indexes, the samples table, files of their final size."""
    work, totals = plan.work, plan.totals
    for folder in ("out", "done"):
        (work / folder).mkdir(exist_ok=True)
    packs, samples, media = totals["packs"], totals["samples"], totals["media"]
    bounds = np.asarray(plan.bounds)
    media_bounds = starts(np.add.reduceat(plan.samples["media"], bounds[:-1], dtype=np.int64))
    for name, element, count, one in (
        ("tokens", np.int32, samples, bounds),
        ("labels", np.int32, samples, bounds),
        ("media", np.uint8, media, media_bounds),
    ):
        IndexFile(element, count, packs).create(out_path(work, f"{name}.idx"), one)
        out_path(work, f"{name}.bin").touch()
    for suffix, dtype, rows in (("tiles.npy", TILE, totals["tiles"]), ("crc32.npy", CRC, 2 * packs + media)):
        header = npy_header(dtype, rows)
        with out_path(work, suffix).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + dtype.itemsize * rows)
    out_path(work, "samples.npy").write_bytes(npy_header(SAMPLE, samples))
    with out_path(work, "samples.npy").open("ab") as stream:
        for row in plan.ranges:
            entries = plan.samples[row["sample"] : row["sample"] + row["samples"]]
            records = np.zeros(len(entries), dtype=SAMPLE)
            for name, column in (("length", "tokens"), ("labels", "labelled")):
                records[name] = entries[column]
            for name in ("source", "line", "tiles", "shortened", "cleaned", "dropped"):
                records[name] = entries[name]
            records["cost"] = sample_cost(records["length"], records["tiles"], tokens_per_tile)
            stream.write(records.tobytes())


class PackWriter:
    """Writes ranges of one plan."""

    def __init__(self, job: PackJob) -> None:
        self._plan = Plan(job.work)
        self._work, self._tokens_per_tile = job.work, job.tokens_per_tile
        self._chunk = lru_cache(maxsize=_OPEN_FILES)(lambda number: ChunkFile(chunk_path(job.work, number)))
        self._regions = _Regions()
        totals = self._plan.totals
        packs = totals["packs"]
        self._samples_index = IndexFile(np.int32, totals["samples"], packs)
        self._media_index = IndexFile(np.uint8, totals["media"], packs)
        self._tiles_at = len(npy_header(TILE, totals["tiles"]))
        self._crc_at = len(npy_header(CRC, 2 * packs + totals["media"]))
        self._files = {suffix: os.open(out_path(job.work, suffix), os.O_WRONLY) for suffix in _WRITTEN}

    def write(self, number: int) -> None:
        """Write one range, and mark it as done once the disk has it.

        Raises:
            DataError: a picture is no longer what it was when its record was compiled.
        """
        row = self._plan.ranges[number]
        first, count = int(row["sample"]), int(row["samples"])
        entries = self._plan.samples[first : first + count]
        bounds = self._plan.bounds[row["pack"] : row["pack"] + row["packs"] + 1] - first
        self._text(row, entries, bounds)
        sizes, media = self._media(row, entries)
        self._tiles(row, entries, bounds, media)
        files = self._files
        for name in ("tokens", "labels"):
            self._samples_index.write(files[f"{name}.idx"], first, 4 * int(row["token"]), entries["tokens"])
        self._media_index.write(files["media.idx"], int(row["medium"]), int(row["byte"]), sizes)
        for descriptor in files.values():
            sync_data(descriptor)
        done_path(self._work, number).touch()

    def _text(self, row: np.void, entries: npt.NDArray[Any], bounds: Int64) -> None:
        """Tokens, labels, and the checksums of both for each pack."""
        parts = [
            self._chunk(chunk).tokens_and_labels(index)
            for chunk, index in zip(entries["chunk"].tolist(), entries["index"].tolist(), strict=True)
        ]
        for which, name in enumerate(("tokens", "labels")):
            packs = [b"".join(part[which] for part in parts[a:b]) for a, b in _pairs(bounds)]
            write_at(self._files[f"{name}.bin"], b"".join(packs), 4 * int(row["token"]))
            sums = np.fromiter(map(zlib.crc32, packs), dtype=CRC, count=len(packs))
            self._write_crc(which * self._plan.totals["packs"] + int(row["pack"]), sums)

    def _media(self, row: np.void, entries: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Every medium, and their checksums. Returns sizes and `MEDIUM` records, `[media of the range]`."""
        place = int(row["byte"])
        sizes: list[int] = []
        sums: list[int] = []
        tables = []
        descriptor = self._files["media.bin"]
        for chunk, index in zip(entries["chunk"].tolist(), entries["index"].tolist(), strict=True):
            shard = self._chunk(chunk)
            media = shard.media_of(index)
            tables.append(media)
            for path, offset, size, stamp, known in media[["path", "offset", "size", "stamp", "crc32"]].tolist():
                if path < 0:
                    data = shard.read(offset, size)
                else:
                    data = self._regions.read(shard.paths[path], offset, size, stamp)
                crc = zlib.crc32(data)
                if known not in (-1, crc):
                    raise DataError(f"{shard.paths[path]} is damaged at byte {offset}. Run again without --resume.")
                write_at(descriptor, data, place)
                place += size
                sizes.append(size)
                sums.append(crc)
        self._write_crc(2 * self._plan.totals["packs"] + int(row["medium"]), np.array(sums, dtype=CRC))
        return np.array(sizes, dtype=np.int64), np.concatenate(tables)

    def _tiles(self, row: np.void, entries: npt.NDArray[Any], bounds: Int64, media: npt.NDArray[Any]) -> None:
        """Rows of the tiles table."""
        slots = np.concatenate(
            [
                self._chunk(chunk).slots_of(index)
                for chunk, index in zip(entries["chunk"].tolist(), entries["index"].tolist(), strict=True)
            ]
        )
        sample = np.repeat(np.arange(len(entries)), entries["tiles"])  # of each tile
        pack_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        token_starts = starts(entries["tokens"].astype(np.int64))[:-1]
        in_pack = token_starts - token_starts[bounds[:-1]][pack_of]
        medium = slots["media"] + starts(entries["media"].astype(np.int64))[sample]
        rows = np.zeros(len(slots), dtype=TILE)
        rows["pack"] = pack_of[sample] + row["pack"]
        rows["first_token"] = slots["first_token"] + in_pack[sample]
        rows["tokens"] = self._tokens_per_tile
        rows["media"] = medium + row["medium"]
        for name in ("row", "col", "rows", "cols", "thumbnail"):
            rows[name] = slots[name]
        for name in ("width", "height", "frame"):
            rows[name] = media[name][medium]
        write_at(self._files["tiles.npy"], rows.tobytes(), self._tiles_at + TILE.itemsize * int(row["tile"]))

    def _write_crc(self, first: int, sums: npt.NDArray[Any]) -> None:
        write_at(self._files["crc32.npy"], sums.tobytes(), self._crc_at + CRC.itemsize * first)

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._regions.close()


class _Regions:
    """Reads files and regions of them, and rejects a file that has changed since its record was compiled."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[int, int]] = OrderedDict()  # path -> (descriptor, modification time)

    def read(self, path: str, offset: int, size: int, stamp: int) -> bytes:
        try:
            if path not in self._open:
                descriptor = os.open(path, os.O_RDONLY)
                self._open[path] = (descriptor, os.fstat(descriptor).st_mtime_ns)
                if len(self._open) > _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1][0])
            descriptor, now = self._open[path]
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{path} was read before and cannot be now: {error.strerror}. {_AGAIN}") from None
        if len(data) != size or stamp not in (-1, now):
            raise DataError(f"{path} has changed since its record was compiled. {_AGAIN}")
        return data

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _pairs(bounds: Int64) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


_AGAIN = "Leave the media as they are while they are compiled, and run again without --resume."
