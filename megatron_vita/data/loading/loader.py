"""(seed, consumed packs, this rank's coordinates) -> the step's batches, sliced for this rank, decoded ahead."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vita.config import DataConfig, TrainConfig
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.loading.balance import assign_packs
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.packed_batch import (
    PackedSequence,
    blank_tiles,
    build_packed_sequence,
    local_tokens,
    picture_runs,
    read_tiles_into,
)
from megatron_vita.data.loading.sampler import PackOrder
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64, SequenceLayout, TileRoutes

_RUN = 8
"""Tiles that a worker decodes in one go: a step of one pack keeps all workers busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCoords:
    """A rank's coordinates: all that the loader needs to know about parallelism."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    sequence_parallel: bool = False
    holds_tower: bool = True
    """This rank encodes tiles (first pipeline stage of a model with a tower); no other rank reads a picture."""

    @property
    def group_rank(self) -> int:
        """Rank in the tensor x context group that shares the tiles."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def prefix(self) -> str:
        """The rank's name, as an error begins with it."""
        return f"data rank {self.dp_rank}, context rank {self.cp_rank}, tensor rank {self.tp_rank}, "


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """One optimizer step, as one rank sees it."""

    micro_batches: list[Batch]
    """This rank's part, one packed sequence each."""
    pack_ids: tuple[int, ...]
    """Packs of the whole global batch, in the order of the stream."""
    sample_ids: tuple[int, ...]
    """Samples of the whole global batch, by their number in the samples file, in the order of the stream."""
    num_labels: int
    """Labelled tokens of the whole global batch, masked samples not counted."""
    failed: tuple[int, ...]
    """Samples with a picture that failed to decode on this rank (its tiles are zero), ascending."""
    consumed_packs: int
    """Packs of the stream that are consumed once this step is done: where to resume."""
    label_counts: tuple[int, ...] = ()
    """Labelled tokens of each of sample_ids, before masking."""
    packed: tuple[PackedSequence, ...] = ()
    """The packed sequence that each micro-batch was sliced from."""
    cp_rank: int = 0
    """Whose slice the micro-batches hold."""
    masked: frozenset[int] = frozenset()
    """Samples whose labels are taken out."""


class PackLoader:
    """Endless iterator over a stage's steps.

    The stream of packs depends on (seed, manifest digest, consumed packs) alone, and so do the pixels; the number of
    worker threads, the parallel layout and the micro-batch size change which rank computes what, never which packs make
    a step.
    """

    def __init__(
        self,
        data: DataConfig,
        train: TrainConfig,
        coords: RankCoords,
        *,
        consumed_packs: int = 0,
        valid: bool = False,
        prepare: Callable[[Batch], Any] | None = None,
        allocate: Callable[..., torch.Tensor] = torch.empty,
    ) -> None:
        """Open the shards and start to decode the first step.

        Args:
            data: the stage's data section.
            train: its train section (seed, global and micro-batch size).
            coords: this rank.
            consumed_packs: where the stream continues.
            valid: read `data.valid_data_path` instead, in an order that is the same for every seed.
            prepare: called with every batch in a worker, while its tiles are decoded; gives its `prepared`.
            allocate: (shape, dtype=) -> uninitialised memory for the tiles, on the CPU.

        Raises:
            ConfigError: the shards do not exist, or the batch does not split.
            DataError: the shards are damaged.
        """
        prefix = data.valid_data_path if valid else data.data_path
        if not prefix:
            raise ConfigError(
                f"data.{'valid_data_path' if valid else 'data_path'} is not set. Give the shards' prefix."
            )
        if train.global_batch_size % (train.micro_batch_size * coords.dp_size):
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of micro_batch_size "
                f"{train.micro_batch_size} x {coords.dp_size} data-parallel ranks. Change one of them."
            )
        if consumed_packs < 0:
            raise ConfigError(f"consumed_packs={consumed_packs} must not be negative.")
        self.shards = ShardSet(prefix)
        if self.shards.manifest.seq_length > data.seq_length:
            raise ConfigError(
                f"{prefix} is packed to {self.shards.manifest.seq_length} tokens, but data.seq_length is "
                f"{data.seq_length}. Make them equal."
            )
        self._data, self._train, self._coords = data, train, coords
        self._prepare, self._allocate = prepare, allocate
        self.order = order_of(self.shards, data, train, valid=valid)
        self._next = consumed_packs
        self._threads = ThreadPoolExecutor(data.num_workers, "tiles") if data.num_workers else None
        self._ahead: deque[tuple[Int64, int, list[Future[_Slice]]]] = deque()
        if self._threads:
            self._submit()

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """The next step; waits for its tiles where they are not decoded yet."""
        if self._threads is None:
            packs, consumed, mine = self._take()
            return self._assemble(packs, consumed, [self._slice(each) for each in mine])
        while len(self._ahead) < 2:  # the step that is asked for, and the one after it
            self._submit()
        packs, consumed, futures = self._ahead.popleft()
        return self._assemble(packs, consumed, [future.result() for future in futures])

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker threads. Called (or `with` used) by everything that stops before the process ends."""
        self._ahead.clear()
        if self._threads:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _take(self) -> tuple[Int64, int, list[list[int]]]:
        """Packs of the next step, packs consumed after it, and the packs of each of this rank's packed sequences."""
        packs = self.order.packs(self._next)
        self._next += len(packs)
        mine = assign_packs(packs, self.order.work[packs], self._coords.dp_size)[self._coords.dp_rank].tolist()
        size = self._train.micro_batch_size
        return packs, self._next, [mine[start : start + size] for start in range(0, len(mine), size)]

    def _submit(self) -> None:
        assert self._threads is not None
        packs, consumed, mine = self._take()
        self._ahead.append((packs, consumed, [self._threads.submit(self._slice, each) for each in mine]))

    def _slice(self, packs: list[int]) -> _Slice:
        """One micro-batch."""
        coords, shards = self._coords, self.shards
        packed = build_packed_sequence(
            shards, packs, seq_length=self._data.seq_length, reset=self._data.reset_per_document
        )
        layout = SequenceLayout(packed.documents, coords.cp_size, coords.tp_size if coords.sequence_parallel else 1)
        routes = TileRoutes(layout, packed.first_token, shards.manifest.tokens_per_tile, coords.tp_size)
        own = routes.tiles_of(coords.group_rank)
        tile_ids = packed.tile_ids[own.start : own.stop] if coords.holds_tower else packed.tile_ids[:0]
        tiles = blank_tiles(shards, len(tile_ids), self._allocate)
        failed = [self._read(tiles[run], tile_ids[run]) for run in picture_runs(shards, tile_ids, _RUN)]
        tokens, labels, positions = local_tokens(shards, packed, layout, coords.cp_rank)
        batch = Batch(
            tokens=tokens,
            labels=labels,
            positions=positions,
            layout=layout,
            tiles=tiles,
            tile_ids=torch.from_numpy(tile_ids),
            routes=routes,
            sample_ids=tuple(packed.sample_ids.tolist()),
        )
        if self._prepare is not None:
            batch = dataclasses.replace(batch, prepared=self._prepare(batch))
        return _Slice(batch, packed, failed)

    def _read(self, tiles: torch.Tensor, tile_ids: Int64) -> Callable[[], list[int]]:
        """Start to decode a run of tiles. The function returned waits for it and returns the samples that failed."""
        if self._threads is None:
            failed = read_tiles_into(tiles, self.shards, tile_ids, self._coords.prefix)
            return lambda: failed
        return self._threads.submit(read_tiles_into, tiles, self.shards, tile_ids, self._coords.prefix).result

    def _assemble(self, packs: Int64, consumed: int, slices: list[_Slice]) -> StepBatches:
        failed = {sample for one in slices for wait in one.failed for sample in wait()}
        ids = samples_of(self.shards, packs)
        counts = self.shards.samples["labels"][ids]
        num_labels = int(counts.sum())
        return StepBatches(
            micro_batches=[one.batch for one in slices],
            pack_ids=tuple(packs.tolist()),
            sample_ids=tuple(ids),
            num_labels=num_labels,
            failed=tuple(sorted(failed)),
            consumed_packs=consumed,
            label_counts=tuple(counts.tolist()),
            packed=tuple(one.packed for one in slices),
            cp_rank=self._coords.cp_rank,
        )


def order_of(shards: ShardSet, data: DataConfig, train: TrainConfig, *, valid: bool = False) -> PackOrder:
    """The order in which a stage consumes a shard set; validation's is the same for every seed."""
    return PackOrder(
        shards.pack_work(data.reset_per_document),
        seed=0 if valid else train.seed,
        digest=shards.manifest.digest,
        global_batch_size=train.global_batch_size,
    )


def samples_of(shards: ShardSet, packs: Int64) -> list[int]:
    """Samples of some packs, by their number in the samples file, in the order of the packs."""
    return [sample for pack in packs.tolist() for sample in shards.pack_samples(pack)]


@dataclass(frozen=True, slots=True)
class _Slice:
    """What a worker makes of one packed sequence. Its tiles are decoded once every `failed` has returned."""

    batch: Batch
    packed: PackedSequence
    failed: list[Callable[[], list[int]]]
    """For each run of tiles, a function that waits for it and returns the samples with a picture that failed."""


def mask_samples(step: StepBatches, failed_ids: Iterable[int]) -> StepBatches:
    """Take samples out of the loss: their labels become -100 and are no longer counted. Lengths stay.

    Every rank, the last pipeline stage too, calls it with the same ids (the union of all ranks' `failed`). Ids that are
    not in the step, or already masked, change nothing.
    """
    new = (set(failed_ids) & set(step.sample_ids)) - step.masked
    if not new:
        return step
    lost = sum(count for sample, count in zip(step.sample_ids, step.label_counts, strict=True) if sample in new)
    num_labels = step.num_labels - lost
    batches = []
    for batch, packed in zip(step.micro_batches, step.packed, strict=True):
        gone = np.flatnonzero(np.isin(packed.sample_ids, list(new)))
        if len(gone):
            labels = batch.labels.clone()
            local = batch.layout.local_positions(step.cp_rank)
            for index in gone.tolist():
                first, last = np.searchsorted(local, packed.sample_starts[index : index + 2]).tolist()
                labels[0, first:last] = IGNORE_INDEX
            batch = dataclasses.replace(batch, labels=labels, prepared=None)
        batches.append(batch)
    return dataclasses.replace(step, micro_batches=batches, num_labels=num_labels, masked=step.masked | new)
