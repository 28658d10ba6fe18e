"""Which Example goes where in a set: laid out on disk before anything is written, so that processes write side by side.

Lengths alone decide; the tables are memory-mapped, whatever the number of samples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vita.data.shards.format import GrowingTable, blocks, starts
from megatron_vita.data.shards.writer.intermediate import ChunkFile
from megatron_vita.data.shards.writer.packing import pack_arrays
from megatron_vita.files import write_atomic
from megatron_vita.layout import Int64

ENTRY = np.dtype(
    [
        ("chunk", "<i4"),
        ("index", "<i4"),  # in the chunk
        ("source", "<i4"),
        ("line", "<i8"),
        ("tokens", "<i4"),
        ("labelled", "<i4"),
        ("tiles", "<i4"),
        ("media", "<i4"),
        ("bytes", "<i8"),
        ("shortened", "<i4"),
        ("cleaned", "<i4"),
        ("dropped", "<i4"),
    ]
)
"""One Example of an intermediate shard, as far as planning needs it."""

RANGE = np.dtype([(name, "<i8") for name in ("pack", "packs", "sample", "samples", "token", "tile", "medium", "byte")])
"""A run of packs that one process writes: its first pack and sample with their numbers, and where its part of each file
begins, counted in tokens, tiles, media and bytes of media."""

RANGE_BYTES = 64 << 20
"""About as much is written by one process at once."""

_ENTRIES = "entries.npy"


def chunk_path(work: Path, number: int) -> Path:
    """Intermediate shard of a chunk; a thousand to a folder."""
    return work / "intermediate" / f"{number // 1000:05d}" / f"{number:08d}"


class EntryTable:
    """Collects the entries of all intermediate shards, in order."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "plan"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._table = GrowingTable(self.folder / _ENTRIES, ENTRY)

    def add(self, number: int, chunk: ChunkFile, source: int | Int64) -> None:
        """All Examples of a chunk; `source` is one number or one for each."""
        rows = np.zeros(len(chunk.examples), dtype=ENTRY)
        for name in ("line", "tokens", "labelled", "tiles", "media", "bytes", "shortened", "cleaned", "dropped"):
            rows[name] = chunk.examples[name]
        rows["chunk"], rows["source"], rows["index"] = number, source, np.arange(len(rows))
        self.append(rows)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Further entries (`ENTRY`)."""
        self._table.append(rows)

    @property
    def rows(self) -> int:
        """Entries so far."""
        return self._table.rows

    def shuffled(self, capacity: int, seed: int) -> Plan:
        """Lay them into packs, shuffled before: packs of one length else come from one file, as the files follow."""
        self._table.finish()
        order = np.random.default_rng(seed).permutation(self.rows)
        lengths = np.load(self.folder / _ENTRIES, mmap_mode="r")["tokens"][order]
        bounds, items = pack_arrays(lengths, capacity)
        return self._finish(bounds, order[items])

    def as_given(self, bounds: Int64) -> Plan:
        """Keep the order of the entries; `bounds` `[packs + 1]` says where the packs begin."""
        self._table.finish()
        return self._finish(bounds, np.arange(self.rows))

    def _finish(self, bounds: Int64, order: Int64) -> Plan:
        entries = np.load(self.folder / _ENTRIES, mmap_mode="r")
        table = GrowingTable(self.folder / "samples.npy", ENTRY)
        for part in blocks(len(order)):
            table.append(entries[order[part]])
        table.finish()
        (self.folder / _ENTRIES).unlink()
        samples = np.load(self.folder / "samples.npy", mmap_mode="r")
        np.save(self.folder / "bounds.npy", bounds)
        ranges, totals = _ranges(samples, bounds)
        np.save(self.folder / "ranges.npy", ranges)
        write_atomic(self.folder / "totals.json", json.dumps(totals))  # last: without it there is no plan
        return Plan(self.folder.parent)


class Plan:
    """A finished plan."""

    def __init__(self, work: Path) -> None:
        """Open it.

        Raises:
            FileNotFoundError: there is none.
        """
        folder = work / "plan"
        self.work = work
        self.totals: dict[str, int] = json.loads((folder / "totals.json").read_text())
        """packs, samples, tokens, labels, tiles, media, bytes."""
        self.samples: npt.NDArray[Any] = np.load(folder / "samples.npy", mmap_mode="r")
        """`ENTRY` in the set's order."""
        self.bounds: Int64 = np.load(folder / "bounds.npy", mmap_mode="r")
        """First sample of each pack, and the number of samples; `[packs + 1]`."""
        self.ranges: npt.NDArray[Any] = np.load(folder / "ranges.npy")
        """`RANGE` in order."""

    def range_ends(self, name: str) -> list[int]:
        """Where each range's part of a file ends; `name` is a count of `RANGE` (token, byte)."""
        total = {"token": "tokens", "byte": "bytes"}[name]
        return [*self.ranges[name][1:].tolist(), self.totals[total]]

    @cached_property
    def by_source(self) -> dict[int, dict[str, int]]:
        """Source -> samples, tokens, tiles, shortened, cleaned, dropped."""
        columns = ("tokens", "tiles", "shortened", "cleaned", "dropped")
        out: dict[int, dict[str, int]] = {}
        for part in blocks(len(self.samples)):
            rows = self.samples[part]
            for source in np.unique(rows["source"]).tolist():
                mine = rows[rows["source"] == source]
                counts = out.setdefault(source, dict.fromkeys(("samples", *columns), 0))
                counts["samples"] += len(mine)
                for name in columns:
                    counts[name] += int(mine[name].sum())
        return out


def _ranges(samples: npt.NDArray[Any], bounds: Int64) -> tuple[npt.NDArray[Any], dict[str, int]]:
    """Cut the packs into ranges of about RANGE_BYTES."""
    per_pack: Callable[[str], Int64] = lambda name: np.add.reduceat(samples[name], bounds[:-1], dtype=np.int64)  # noqa: E731
    firsts = {name: starts(per_pack(name)) for name in ("tokens", "tiles", "media", "bytes")}
    written = 8 * firsts["tokens"] + firsts["bytes"]
    cuts = np.flatnonzero(np.diff(written[:-1] // RANGE_BYTES, prepend=-1))
    ends = np.append(cuts[1:], len(bounds) - 1)
    out = np.zeros(len(cuts), dtype=RANGE)
    out["pack"], out["packs"] = cuts, ends - cuts
    out["sample"], out["samples"] = bounds[cuts], bounds[ends] - bounds[cuts]
    for name, column in (("token", "tokens"), ("tile", "tiles"), ("medium", "media"), ("byte", "bytes")):
        out[name] = firsts[column][cuts]
    totals = {name: int(values[-1]) for name, values in firsts.items()}
    totals |= {"packs": len(bounds) - 1, "samples": len(samples), "labels": int(samples["labelled"].sum())}
    return out, totals
