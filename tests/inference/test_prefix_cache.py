"""Blocks that several sequences share. tests/inference/test_scheduler.py runs whole schedules over them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.data.example import TileSlot
from megatron_vita.inference.prefix_cache import PrefixCache, block_keys
from megatron_vita.layout import SequenceLayout
from tests.inference.books import Books, content


def keys_of(tokens: list[int], tiles: tuple[TileSlot, ...] = (), digests: tuple[bytes, ...] = ()) -> list[bytes]:
    return block_keys(np.array(tokens, dtype=np.int32), 4, tiles, digests, 3)


TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(TOKENS, TOKENS)
def test_keys_are_equal_where_all_tokens_so_far_are(one: list[int], other: list[int]) -> None:
    first, second = keys_of(one), keys_of(other)
    assert (len(first), len(second)) == (len(one) // 4, len(other) // 4)
    for block, (a, b) in enumerate(zip(first, second, strict=False)):
        assert (a == b) == (one[: 4 * block + 4] == other[: 4 * block + 4])
    assert len(set(first)) == len(first)


def test_keys_tell_pictures_and_their_tiles_apart() -> None:
    tokens = [9] * 16

    def tile(first: int, media: int = 0, col: int = 0) -> TileSlot:
        return TileSlot(first, media, 0, col, 1, 2)

    plain = keys_of(tokens, (tile(5),), (b"a",))
    assert keys_of(tokens, (tile(5),), (b"a",)) == plain
    others = [
        keys_of(tokens, (tile(5),), (b"b",)),  # another picture
        keys_of(tokens, (tile(5, col=1),), (b"a",)),  # another tile of it
        keys_of(tokens, (tile(4),), (b"a",)),  # elsewhere
        keys_of(tokens, (tile(5), tile(8, 1)), (b"a", b"b")),  # one more
        keys_of(tokens),
    ]
    for other in others:
        assert other[0] == plain[0], "tokens before the picture are shared"
    assert len({one[2] for one in [plain, *others]}) == 6
    crossing = keys_of(tokens, (tile(6),), (b"a",)), keys_of(tokens, (tile(6),), (b"b",))
    assert crossing[0][1] != crossing[1][1], "a tile over a border marks both blocks"
    assert crossing[0][2] != crossing[1][2]


def test_the_longest_unused_prefix_gives_way_from_its_end() -> None:
    cache = PrefixCache(num_blocks=6, block_size=4, ranks=1, rank=0)
    prompts = [[number] * 8 for number in range(3)]
    for prompt in prompts:
        table = cache.table()
        cache.add(table, [8])
        cache.publish(table, keys_of(prompt), 0, [SequenceLayout((8,)).spans(0)], [0])
        cache.free(table)
    assert cache.free_blocks() == 6, "what nobody uses can be taken"
    again = cache.table()
    assert cache.share(again, keys_of(prompts[0])) == 8
    assert cache.free_blocks() == 4, "used again"
    fresh = cache.table()
    cache.add(fresh, [4])
    known = [cache.shareable(keys_of(prompt)) for prompt in prompts]
    assert known == [2, 1, 2]
    cache.free(again)
    cache.free(fresh)
    assert cache.free_blocks() == 6


def test_an_answer_beside_shared_blocks_leaves_them_alone() -> None:
    """Two sequences that share a prompt decode at the same time; what either reads is its own text."""
    for ranks in (1, 2):
        books = Books(ranks=ranks, num_blocks=40, block_size=4, budget=64, prefix=True)
        books.add(list(range(30)), 12)
        while not books.ranks[0].sequences[0].generated:
            books.step()
        books.add([*range(30), 5], 12)
        shared = []
        while books.busy:
            before = dict(books.ranks[0].cells)
            held = {block for one in books.ranks[0].sequences for block in one.table.blocks[0]}
            books.step()
            shared.append(books.ranks[0].sequences[1].shared)
            changed = {slot // 4 for slot, cell in books.ranks[0].cells.items() if before.get(slot) not in (None, cell)}
            assert not changed & held, "a block in use is written once"
        assert max(shared) >= 16
        assert content(books.ranks[0].sequences[0], 29) == content(books.ranks[0].sequences[1], 29)
