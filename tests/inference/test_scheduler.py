"""Properties of continuous batching: who takes part in a step, and that no token is lost on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.books import Books, run

RANKS = st.sampled_from([1, 2, 3, 4])
DRAW = st.randoms(use_true_random=False)


def arrivals_of(draw: random.Random, longest: int, count: int) -> list[tuple[int, list[int], int]]:
    """Prompts and limits of up to `longest` tokens together, at random steps; half of them alike at the beginning."""
    found = []
    for _ in range(count):
        length = draw.choice((draw.randint(1, longest - 1), draw.randint(1, min(9, longest - 1))))
        limit = draw.randint(1, min(30, longest - length))
        prompt = list(range(length)) if draw.random() < 0.5 else [draw.randrange(3) for _ in range(length)]
        found.append((draw.choice((0, draw.randrange(40))), prompt, limit))
    return sorted(found, key=lambda one: one[0])


@given(RANKS, st.integers(1, 6), st.integers(2, 24), st.integers(1, 40), st.booleans(), DRAW)
@settings(max_examples=60)
def test_nothing_is_lost(
    ranks: int, block_size: int, num_blocks: int, chunk: int, prefix: bool, draw: random.Random
) -> None:
    """Any cache that holds one sequence, any budget, with and without a prefix cache, with requests given up."""
    books = Books(ranks=ranks, num_blocks=num_blocks, block_size=block_size, budget=chunk * ranks, prefix=prefix)
    longest = books.ranks[0].blocks.capacity
    if longest < 2:
        return
    count = draw.randint(1, 8)
    aborted = {number: draw.randrange(30) for number in range(count) if draw.random() < 0.2}
    run(books, arrivals_of(draw, min(longest, 80), count), aborted)


@pytest.mark.slow
@given(RANKS, st.sampled_from([64, 100, 8192]), st.integers(0, 300), DRAW)
@settings(max_examples=10)
def test_ranks_hold_equal_shares(ranks: int, chunk: int, others: int, draw: random.Random) -> None:
    """Blocks of 16 and chunks of several blocks a rank: at no time do shares of a sequence differ by over a block,
    however many tokens of the budget other sequences take."""
    books = Books(ranks=ranks, num_blocks=4000 // ranks, block_size=16, budget=chunk * ranks)
    few = [(0, [1, 2], draw.randint(1, 12)) for _ in range(others % 90)]
    long = [(draw.randrange(3), [5] * draw.randint(1, 900), draw.randint(1, 40)) for _ in range(3)]
    run(books, sorted([*few, *long], key=lambda one: one[0]))
    assert books.largest_gap <= 16


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_budget_full_of_decodes_still_prefills_evenly(ranks: int) -> None:
    books = Books(ranks=ranks, num_blocks=250, block_size=4, budget=8)
    run(books, [*((0, [1], 60) for _ in range(12)), (8, [1] * 50, 3)])
    assert books.largest_gap <= 4
    assert books.ranks[0].scheduler.preemptions == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_prompt_behind_a_long_one_is_prefilled_evenly(ranks: int) -> None:
    """The long prompt takes whole blocks of each step's budget and leaves three tokens, step after step."""
    books = Books(ranks=ranks, num_blocks=1000, block_size=4, budget=16 * ranks + 4)
    run(books, [(0, [1], 90), (1, [2] * 1200, 3), (1, [3] * 300, 3)])
    assert books.largest_gap <= 4


def test_the_youngest_gives_way_and_comes_back() -> None:
    books = Books(ranks=2, num_blocks=10, block_size=2, budget=16)
    run(books, [(0, [one] * 6, 20) for one in range(4)])
    scheduler: Any = books.ranks[0].scheduler
    assert scheduler.preemptions > 0


def test_one_sequence_fills_the_cache() -> None:
    for ranks in (1, 2, 4):
        for chunk in (1, 3, 100):
            books = Books(ranks=ranks, num_blocks=4, block_size=3, budget=chunk * ranks)
            longest = books.ranks[0].blocks.capacity
            run(books, [(0, [1] * (longest - 3), 3), (0, [2], longest - 1), (0, [3] * (longest - 1), 1)])


def test_at_most_so_many_run_at_once() -> None:
    books = Books(ranks=2, num_blocks=64, block_size=4, budget=64, max_num_seqs=3)
    for number in range(7):
        books.add([number] * 5, 9)
    while books.busy:
        books.step()
        assert len(books.ranks[0].scheduler.running) <= 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_who_shares_a_long_prefix_is_answered_beside_it(ranks: int) -> None:
    """The cache holds the prefix once, and a few blocks more."""
    books = Books(ranks=ranks, num_blocks=72 // ranks, block_size=4, budget=64, prefix=True)
    for number in range(4):
        books.add([*range(200), 1000 + number], 12)
    together = 0
    while books.busy:
        books.step()
        together = max(together, sum(one.decoding for one in books.ranks[0].scheduler.running))
    assert together >= 3


def test_a_shared_prefix_is_written_once() -> None:
    prompts = [[*range(40), number] for number in range(5)]
    plain, shared = (Books(ranks=2, num_blocks=64, block_size=4, budget=64, prefix=prefix) for prefix in (False, True))
    for books in (plain, shared):
        run(books, [(2 * number, prompt, 3) for number, prompt in enumerate(prompts)])
    assert plain.written - shared.written >= 4 * 32
