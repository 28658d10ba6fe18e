"""Properties of the block tables of all context ranks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.inference.blocks import BlockManager, BlockTable, FreeBlocks
from megatron_vita.layout import SequenceLayout, most_tokens


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_free_ranges_hold_each_block_once(num_blocks: int, draw: random.Random) -> None:
    free = FreeBlocks(num_blocks)
    held: list[list[int]] = []
    for _ in range(60):
        if free.count and draw.random() < 0.6:
            after = draw.choice([None, draw.randrange(num_blocks)])
            held.append(free.take(draw.randint(1, free.count), after))
            assert len(set(held[-1])) == len(held[-1])
        elif held:
            free.give(held.pop(draw.randrange(len(held))))
        taken = [block for one in held for block in one]
        ranges = sorted((start, start + length) for start, length in free._lengths.items())
        untaken = [block for start, stop in ranges for block in range(start, stop)]
        assert sorted(taken + untaken) == list(range(num_blocks))
        assert free.count == len(untaken)
        assert [start for start, _ in ranges] == free._starts
        lengths = free._lengths
        assert not lengths or free._longest() == max(lengths, key=lambda start: (lengths[start], -start))
        assert len(free._heap) <= 2 * num_blocks + 64
        assert all(one[1] < other[0] for one, other in pairwise(ranges)), "ranges are not joined"


def test_a_sequence_grows_in_one_run_where_it_can() -> None:
    """Two sequences that grow in turn: neither stands in the other's way until the free blocks between them end."""
    manager = BlockManager(num_blocks=64, block_size=4, ranks=1, rank=0)
    tables = [manager.table(), manager.table()]
    for _ in range(15):
        for table in tables:
            manager.add(table, [4])
    assert [len(table.runs) for table in tables] == [1, 1]


class Books:
    """A manager on every rank, all told the same, and what the tokens of each sequence should be."""

    def __init__(self, num_blocks: int, block_size: int, ranks: int) -> None:
        self.managers = [
            BlockManager(num_blocks=num_blocks, block_size=block_size, ranks=ranks, rank=rank) for rank in range(ranks)
        ]
        self.tables: list[list[BlockTable]] = []
        self.slots: list[list[list[int]]] = []  # of each sequence and rank, in the order of writing

    def begin(self) -> int:
        self.tables.append([manager.table() for manager in self.managers])
        self.slots.append([[] for _ in self.managers])
        return len(self.tables) - 1

    def add(self, number: int, counts: Sequence[int]) -> None:
        for manager, table, slots in zip(self.managers, self.tables[number], self.slots[number], strict=True):
            slots += manager.add(table, counts).tolist()

    def decode(self, number: int) -> int:
        """The rank that got the token."""
        found = [manager.add_decoded(table) for manager, table in zip(self.managers, self.tables[number], strict=True)]
        (owner,) = [rank for rank, slot in enumerate(found) if slot is not None]
        self.slots[number][owner].append(found[owner])  # type: ignore[arg-type]
        return owner

    def end(self, number: int) -> None:
        for manager, table in zip(self.managers, self.tables.pop(number), strict=True):
            manager.free(table)
        self.slots.pop(number)

    def check(self) -> None:
        size, num_blocks = self.managers[0].block_size, self.managers[0].num_blocks
        for rank, manager in enumerate(self.managers):
            owned: Counter[int] = Counter()
            for tables, slots in zip(self.tables, self.slots, strict=True):
                table = tables[rank]
                assert table.blocks == tables[0].blocks, "ranks keep other books"
                assert table.tokens == [len(one) for one in slots]
                runs = [slot for first, count in table.runs for slot in range(first, first + count)]
                assert runs == slots[rank], "runs are the tokens in the order of writing"
                assert all(one + count != other for (one, count), (other, _) in pairwise(table.runs))
                blocks = table.blocks[rank]
                assert len(blocks) == -(-len(slots[rank]) // size)
                assert [slot // size for slot in slots[rank][::size]] == blocks
                assert [slot % size for slot in slots[rank]] == [n % size for n in range(len(slots[rank]))]
                owned.update(blocks)
            assert set(owned.values()) <= {1}, "a block belongs to two sequences"
            assert manager._available(rank) == num_blocks - len(owned)
            assert manager.free_blocks() == min(one._available(r) for r, one in enumerate(self.managers))


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.integers(2, 30), st.randoms(use_true_random=False))
def test_tables_partition_the_cache(ranks: int, block_size: int, num_blocks: int, draw: random.Random) -> None:
    books = Books(num_blocks, block_size, ranks)
    for _ in range(40):
        number = draw.randrange(len(books.tables)) if books.tables and draw.random() < 0.8 else books.begin()
        table, manager = books.tables[number][0], books.managers[0]
        kind = draw.random()
        if kind < 0.4:
            counts = [draw.randrange(3 * block_size) for _ in range(ranks)]
            missing = [manager._missing(table, rank, count) for rank, count in enumerate(counts)]
            assert manager.most_missing(table, max(counts)) >= max(missing)
            if all(one <= manager._available(rank) for rank, one in enumerate(missing)):
                books.add(number, counts)
        elif kind < 0.8:
            if manager.fits_decoded(table):
                books.decode(number)
        else:
            books.end(number)
        books.check()


def prefill(books: Books, number: int, chunks: Sequence[int], ranks: int) -> None:
    """Add a prompt in chunks, each dealt by itself."""
    for chunk in chunks:
        spans = SequenceLayout((chunk, -chunk % ranks) if chunk % ranks else (chunk,), ranks)
        books.add(
            number,
            [sum(one.stop - one.start for one in spans.spans(rank) if one.document == 0) for rank in range(ranks)],
        )


@given(st.sampled_from([2, 4]), st.integers(0, 3), st.integers(1, 200), st.integers(1, 120))
def test_ranks_differ_by_one_block_at_most(ranks: int, whole: int, rest: int, decoded: int) -> None:
    """As the default settings chunk a prompt: whole blocks on every rank, then what is left; then one by one."""
    size = 16
    books = Books(64, size, ranks)
    number = books.begin()
    prefill(books, number, [2 * ranks * size] * whole, ranks)
    prefill(books, number, [min(rest, 2 * ranks * size)], ranks)
    owners = []
    for _ in range(decoded):
        owners.append(books.decode(number))
        tokens = books.tables[number][0].tokens
        assert max(tokens) - min(tokens) <= size
    books.check()
    filled = [tokens % size == 0 for tokens in books.tables[number][0].tokens]
    assert filled.count(False) <= ranks
    # A block is filled before the next rank's turn, once the prompt's unfilled blocks are.
    settled = owners[ranks * size :]
    for one, other, after in zip(settled, settled[1:], settled[2:], strict=False):
        assert one == other or other == after


def test_uneven_chunks_add_up() -> None:
    """Why the scheduler cuts prompts at whole blocks of every rank: a token at a time goes to the first rank."""
    books = Books(64, 16, 2)
    number = books.begin()
    prefill(books, number, [1] * 40, 2)
    assert books.tables[number][0].tokens == [40, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_capacity_is_what_surely_fits(ranks: int) -> None:
    manager = BlockManager(num_blocks=5, block_size=4, ranks=ranks, rank=0)
    assert manager.capacity == 4 * 4 * ranks
    for length in range(1, manager.capacity + 1):
        table = manager.table()
        layout = SequenceLayout((length, -length % ranks) if length % ranks else (length,), ranks)
        counts = [sum(one.stop - one.start for one in layout.spans(r) if one.document == 0) for r in range(ranks)]
        assert max(counts) == most_tokens(length, ranks, first=True)
        assert manager.most_missing(table, max(counts)) <= manager.most_blocks(length) <= manager.free_blocks()
        manager.add(table, counts)
        manager.free(table)
    assert manager.free_blocks() == 5
