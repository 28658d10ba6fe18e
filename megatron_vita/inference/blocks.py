"""Which block of the key/value cache holds which tokens, on every context-parallel rank.

Every rank keeps the block tables of all context ranks, so nobody has to ask. A block is taken next to the sequence's
last one where that is free: attention reads blocks that follow each other as one run, without a copy. A block may
belong to several sequences that begin alike (inference/prefix_cache.py) and is free when the last of them is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from megatron_vita.layout import Int64


class FreeBlocks:
    """The free blocks of one rank, as ranges."""

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        """Free blocks."""
        self._starts: list[int] = []  # ascending
        self._lengths: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []  # (-length, start) of all ranges, and of some that are gone
        if num_blocks:
            self._insert(0, num_blocks)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Take blocks, as few ranges as possible.

        Args:
            count: at most `self.count`.
            after: block that the first one should follow.
        """
        taken: list[int] = []
        self.count -= count
        following = None if after is None else after + 1
        while len(taken) < count:
            wanted = count - len(taken)
            if following not in self._lengths:
                # In the middle of the longest range, so that the range's neighbours can grow too.
                longest = self._longest()
                following = longest + max(0, self._lengths[longest] - wanted) // 2
                self._split(longest, following)
            length = self._remove(following)
            used = min(wanted, length)
            taken += range(following, following + used)
            if used < length:
                self._insert(following + used, length - used)
            following = None
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        """Free blocks, none of which is free."""
        self.count += len(blocks)
        ordered = np.sort(np.asarray(blocks, dtype=np.int64))
        for part in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
            start, length = int(part[0]), len(part)
            place = bisect_left(self._starts, start)
            if place < len(self._starts) and self._starts[place] == start + length:
                length += self._remove(start + length)
            if place and (before := self._starts[place - 1]) + self._lengths[before] == start:
                self._resize(before, self._lengths[before] + length)
            else:
                self._insert(start, length)

    def _split(self, start: int, at: int) -> None:
        if at != start:
            rest = self._lengths[start] - (at - start)
            self._resize(start, at - start)
            self._insert(at, rest)

    def _longest(self) -> int:
        """Start of the longest range; of several the first."""
        while self._lengths.get(self._heap[0][1]) != -self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][1]

    def _insert(self, start: int, length: int) -> None:
        insort(self._starts, start)
        self._resize(start, length)

    def _resize(self, start: int, length: int) -> None:
        self._lengths[start] = length
        heappush(self._heap, (-length, start))
        if len(self._heap) > 2 * len(self._lengths) + 64:
            self._heap = [(-length, start) for start, length in self._lengths.items()]
            heapify(self._heap)

    def _remove(self, start: int) -> int:
        del self._starts[bisect_left(self._starts, start)]
        return self._lengths.pop(start)


@dataclass(slots=True)
class BlockTable:
    """Blocks of one sequence."""

    blocks: list[list[int]]
    """Of every context rank, in the order of writing; all but the last are full."""
    tokens: list[int]
    """Cached tokens on every context rank."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first slot, tokens) of this rank's runs."""


class BlockManager:
    """Assigns blocks to sequences. All ranks call the same methods in the same order."""

    def __init__(self, *, num_blocks: int, block_size: int, ranks: int, rank: int) -> None:
        """All blocks are free.

        Args:
            num_blocks: of every context rank.
            block_size: tokens of a block.
            ranks: context-parallel ranks.
            rank: this one, of which `BlockTable.runs` speaks.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ranks = ranks
        self.rank = rank
        self._free = [FreeBlocks(num_blocks) for _ in range(ranks)]

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that the empty cache surely holds."""
        return max(0, self.num_blocks - 1) * self.block_size * self.ranks

    def table(self) -> BlockTable:
        """The table of a sequence without tokens."""
        return BlockTable([[] for _ in range(self.ranks)], [0] * self.ranks)

    def most_blocks(self, tokens: int) -> int:
        """Blocks that so many tokens may need on one rank, at most, if they are assigned evenly."""
        share = -(-tokens // self.ranks)
        return -(-share // self.block_size) + 1

    def free_blocks(self) -> int:
        """Free blocks of the rank that has fewest."""
        return min(self._available(rank) for rank in range(self.ranks))

    def fits_decoded(self, table: BlockTable) -> bool:
        """True if there is room for the next generated token."""
        owner = self.decode_rank(table)
        return table.tokens[owner] % self.block_size > 0 or self._available(owner) > 0

    def most_missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks that so many more tokens on every rank take, on the rank that takes most."""
        return max(self._missing(table, rank, tokens) for rank in range(self.ranks))

    def add(self, table: BlockTable, added: Sequence[int]) -> Int64:
        """Give every rank r blocks for `added[r]` more tokens, which must fit.

        Returns:
            int64 `[added[rank]]`: slots of this rank's new tokens.
        """
        for rank, count in enumerate(added):
            if missing := self._missing(table, rank, count):
                blocks = table.blocks[rank]
                blocks += self._take(rank, missing, blocks[-1] if blocks else None)
        before = table.tokens[self.rank]
        table.tokens = [held + count for held, count in zip(table.tokens, added, strict=True)]
        return self._extend_runs(table, before)

    def add_decoded(self, table: BlockTable) -> int | None:
        """Give the next generated token a slot, on the rank `decode_rank`; it must fit.

        Returns:
            the slot, on the rank that owns it; else None.
        """
        owner = self.decode_rank(table)
        blocks, place = table.blocks[owner], table.tokens[owner] % self.block_size
        if not place:
            blocks += self._take(owner, 1, blocks[-1] if blocks else None)
        table.tokens[owner] += 1
        if owner != self.rank:
            return None
        slot = blocks[-1] * self.block_size + place
        first, length = table.runs[-1] if table.runs else (-1, 0)
        if first + length == slot:
            table.runs[-1] = (first, length + 1)
        else:
            table.runs.append((slot, 1))
        return slot

    def decode_rank(self, table: BlockTable) -> int:
        """The rank that the next generated token goes to: the one with an unfilled block, else that with fewest tokens.

        With several unfilled blocks, as a prompt leaves them, the rank with fewest tokens among these: a block is
        filled before the next rank's turn.
        """
        if self.ranks == 1:
            return 0
        unfilled = [rank for rank in range(self.ranks) if table.tokens[rank] % self.block_size]
        return min(unfilled or range(self.ranks), key=lambda rank: (table.tokens[rank], rank))

    def free(self, table: BlockTable) -> None:
        """Take a sequence's blocks back."""
        for rank, blocks in enumerate(table.blocks):
            if blocks:
                self._release(rank, blocks)
        table.blocks = [[] for _ in range(self.ranks)]
        table.tokens = [0] * self.ranks
        table.runs = []

    def _available(self, rank: int) -> int:
        return self._free[rank].count

    def _take(self, rank: int, count: int, after: int | None) -> list[int]:
        return self._free[rank].take(count, after)

    def _release(self, rank: int, blocks: Sequence[int]) -> None:
        self._free[rank].give(blocks)

    def _missing(self, table: BlockTable, rank: int, count: int) -> int:
        return max(0, -(-(table.tokens[rank] + count) // self.block_size) - len(table.blocks[rank]))

    def _extend_runs(self, table: BlockTable, before: int) -> Int64:
        """Slots of this rank's tokens from number `before` on, which are added to the table's runs."""
        size, blocks, after = self.block_size, table.blocks[self.rank], table.tokens[self.rank]
        numbers = np.arange(before, after, dtype=np.int64)
        if not len(numbers):
            return numbers
        used = np.asarray(blocks[before // size : -(-after // size)], dtype=np.int64)
        slots = used[numbers // size - before // size] * size + numbers % size
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(slots)], strict=True):
            first = int(slots[start])
            last = table.runs[-1] if table.runs else None
            if last is not None and sum(last) == first:
                table.runs[-1] = (last[0], last[1] + stop - start)
            else:
                table.runs.append((first, stop - start))
        return slots
