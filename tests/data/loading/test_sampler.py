"""Which packs make which step: every pack once an epoch, alike within a step, from one integer."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.loading.balance import assign_packs
from megatron_vita.data.loading.sampler import PackOrder
from megatron_vita.data.shards.format import attention_pairs
from megatron_vita.data.shards.writer.packing import pack
from megatron_vita.errors import ConfigError
from megatron_vita.layout import Int64
from tests.scripts import load_script

samples = load_script("benchmarks/mix.py").samples


def order(work: object, step: int, seed: int = 1, digest: str = "d") -> PackOrder:
    """Work of one kind may be given flat."""
    values = np.array(work)
    return PackOrder(values.reshape(len(values), -1), seed=seed, digest=digest, global_batch_size=step)


def loads(made: PackOrder, ids: Int64, dp_size: int) -> Int64:
    """Work of each data-parallel rank, `[dp_size, kinds]`."""
    return np.stack([made.work[hand].sum(axis=0) for hand in assign_packs(ids, made.work[ids], dp_size)])


PAIRS = st.tuples(st.integers(0, 10**9), st.integers(0, 80))


@settings(max_examples=60, deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=70), st.integers(1, 20), st.integers(0, 2**31))
def test_every_pack_once_an_epoch_and_resume_from_any_step(work: list, step: int, seed: int) -> None:
    made = order(work, step, seed)
    steps = -(-3 * len(work) // step)
    stream = np.concatenate([made.packs(index * step) for index in range(steps)])
    for epoch in range(3):
        part = stream[epoch * len(work) : (epoch + 1) * len(work)]
        assert sorted(part) == list(range(len(work)))
    resumed = order(work, step, seed)
    for index in reversed(range(steps)):
        np.testing.assert_array_equal(resumed.packs(index * step), stream[index * step : (index + 1) * step])


def test_seed_digest_and_epoch_change_the_order() -> None:
    work = np.full(200, 5)
    base = order(work, 8).packs(0)
    assert not np.array_equal(base, order(work, 8, seed=2).packs(0))
    assert not np.array_equal(base, order(work, 8, digest="e").packs(0))
    assert not np.array_equal(base, order(work, 8).packs(200))


def test_the_order_is_the_same_on_every_machine() -> None:
    """A run that moves to other machines goes on with the same stream; these bytes must never change."""
    work = np.stack([np.arange(1003) ** 2 % 7919 * 1000, np.arange(1003) % 63], axis=1)
    made = order(work, 8)
    stream = np.concatenate([made.packs(index * 8) for index in range(300)])
    assert hashlib.sha256(stream.astype("<i8").tobytes()).hexdigest()[:16] == "2bb59db9b82d196d"


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 64])
@pytest.mark.parametrize(("seq_length", "long"), [(16384, False), (32768, False), (131072, True)])
def test_attention_and_tiles_of_a_step_are_even_over_eight_ranks(seq_length: int, long: bool, step: int) -> None:
    lengths, tiles = samples(60_000, seq_length, long=long)
    packs = pack(lengths, seq_length)
    members, first = np.concatenate(packs), np.cumsum([0] + [len(one) for one in packs[:-1]])
    if long:  # stages 3 and 4: a pack is one document
        pairs = attention_pairs(np.add.reduceat(lengths[members], first))
    else:
        pairs = np.add.reduceat(attention_pairs(lengths)[members], first)
    made = order(np.stack([pairs, np.add.reduceat(tiles[members], first)], axis=1), step)
    most, mean = [], []
    for index in range(min(2 * len(packs) // step, 300)):  # with the steps that straddle two epochs
        each = loads(made, made.packs(index * step), 8)
        most.append(each.max(axis=0))
        mean.append(each.mean(axis=0))
    waited = np.sum(most, axis=0) / np.sum(mean, axis=0)
    assert (waited <= (1.03, 1.03)).all(), waited
    some = np.array(mean)[:, 1] >= 1
    ratios = np.array(most)[some] / np.array(mean)[some]
    assert (ratios.mean(axis=0) <= 1.05).all(), ratios.mean(axis=0)
    assert (np.median(ratios, axis=0) <= 1.02).all(), np.median(ratios, axis=0)


def test_steps_are_alike_in_both_kinds_where_a_sum_would_hide_it() -> None:
    """Attention and tiles that run against one another: their sum is the same everywhere, they are not."""
    heavy = np.arange(4096)
    made = order(np.stack([1000 + heavy, 1000 + heavy[::-1]], axis=1), 8)
    for index in range(512):
        work = made.work[made.packs(index * 8)]
        assert (work.max(axis=0) <= 1.05 * work.mean(axis=0)).all()


def test_packs_of_one_cost_are_shuffled_freely() -> None:
    made = order(np.full(512, 9), 8)
    first, second = made.packs(0), made.packs(512)
    assert len(set(first) & set(second)) < 4
    assert np.abs(np.diff(np.sort(first))).max() > 8


@pytest.mark.parametrize("size", [16, 17, 23, 100, 333])
def test_no_pack_stands_twice_in_a_step_that_straddles_epochs(size: int) -> None:
    rng = np.random.default_rng(size)
    made = order(np.stack([rng.integers(1, 1000, size), rng.integers(0, 9, size)], axis=1), 8)
    for index in range(6 * size // 8):
        assert len(set(made.packs(index * 8).tolist())) == 8


def test_other_packs_meet_in_the_next_epoch() -> None:
    rng = np.random.default_rng(0)
    made = order(np.stack([rng.lognormal(17, 1, 4096).astype(int), rng.integers(0, 63, 4096)], axis=1), 8)
    step_of = np.empty((2, 4096), dtype=int)
    for epoch in range(2):
        for index in range(512):
            step_of[epoch, made.packs(epoch * 4096 + index * 8)] = index
    pairs = [(a, b) for step in range(512) for a, b in itertools.combinations(np.flatnonzero(step_of[0] == step), 2)]
    again = sum(step_of[1, a] == step_of[1, b] for a, b in pairs)
    assert again < len(pairs) / 2


@given(st.lists(PAIRS, min_size=1, max_size=12), st.integers(1, 6))
def test_deal_gives_each_rank_as_many_packs(work: list, dp_size: int) -> None:
    packs = np.arange(100, 100 + len(work) * dp_size)
    values = np.array(work * dp_size)
    hands = assign_packs(packs, values, dp_size)
    assert [len(hand) for hand in hands] == [len(work)] * dp_size
    assert sorted(np.concatenate(hands)) == packs.tolist()
    for first, second in zip(hands, assign_packs(packs, values, dp_size), strict=True):
        np.testing.assert_array_equal(first, second)


def test_deal_evens_out_both_kinds() -> None:
    """Sixteen packs, dear in one kind or the other: two ranks can share them out evenly only by looking at both."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        work = np.stack([rng.integers(100, 1000, 64), rng.integers(0, 60, 64)], axis=1)
        each = np.stack([work[hand].sum(axis=0) for hand in assign_packs(np.arange(64), work, 8)])
        assert (each.max(axis=0) <= 1.05 * each.mean(axis=0)).all(), each


def test_a_step_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 packs does not split over 2"):
        assign_packs(np.arange(3), np.ones((3, 2), dtype=np.int64), 2)


def test_kinds_of_packs_do_not_come_in_runs() -> None:
    made = order([100] * 100 + [200] * 100, 2, seed=3)
    dear = [bool(made.work[made.packs(step * 2)[0], 0] > 100) for step in range(100)]
    longest = max(len(list(run)) for _, run in itertools.groupby(dear))
    assert longest < 15, "half of the steps are dear: a run of 15 of a hundred is one chance in a thousand"
