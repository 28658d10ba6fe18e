"""Which packs make which step: every pack once an epoch, alike within a step, from one integer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.order import PackOrder, deal
from megatron_vita.errors import ConfigError


def order(costs: np.ndarray, step: int, seed: int = 1, digest: str = "d") -> PackOrder:
    return PackOrder(costs, seed=seed, digest=digest, global_batch_size=step)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=70), st.integers(1, 20), st.integers(0, 2**31))
def test_every_pack_once_an_epoch_and_resume_from_any_step(costs: list[int], step: int, seed: int) -> None:
    made = order(np.array(costs), step, seed)
    steps = -(-3 * len(costs) // step)
    stream = np.concatenate([made.packs(index * step) for index in range(steps)])
    for epoch in range(3):
        part = stream[epoch * len(costs) : (epoch + 1) * len(costs)]
        assert sorted(part) == list(range(len(costs)))
    resumed = order(np.array(costs), step, seed)
    for index in reversed(range(steps)):
        np.testing.assert_array_equal(resumed.packs(index * step), stream[index * step : (index + 1) * step])


def test_seed_digest_and_epoch_change_the_order() -> None:
    costs = np.full(200, 5)
    base = order(costs, 8).packs(0)
    assert not np.array_equal(base, order(costs, 8, seed=2).packs(0))
    assert not np.array_equal(base, order(costs, 8, digest="e").packs(0))
    assert not np.array_equal(base, order(costs, 8).packs(200))


@pytest.mark.parametrize("step", [8, 64])
@pytest.mark.parametrize("packs", [5000, 5003])
def test_data_parallel_ranks_of_a_step_cost_alike(step: int, packs: int) -> None:
    costs = np.random.default_rng(0).lognormal(10, 0.7, packs).astype(np.int64)
    made = order(costs, step)
    ratios = []
    for index in range(3 * packs // step):  # three epochs, with the steps that straddle them
        ids = made.packs(index * step)
        loads = np.array([costs[hand].sum() for hand in deal(ids, costs[ids], 8)])
        ratios.append(loads.max() / loads.mean())
    # The last window or two at each end holds outliers that have no equals.
    assert np.quantile(ratios, 0.99) <= 1.05
    assert np.mean(ratios) <= 1.02


def test_packs_of_one_cost_are_shuffled_freely() -> None:
    made = order(np.full(512, 9), 8)
    first, second = made.packs(0), made.packs(512)
    assert len(set(first) & set(second)) < 4
    assert np.abs(np.diff(np.sort(first))).max() > 8


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(1, 6))
def test_deal_gives_each_rank_as_many_packs(costs: list[int], dp_size: int) -> None:
    packs = np.arange(100, 100 + len(costs) * dp_size)
    values = np.array(costs * dp_size)
    hands = deal(packs, values, dp_size)
    assert [len(hand) for hand in hands] == [len(costs)] * dp_size
    assert sorted(np.concatenate(hands)) == packs.tolist()
    for first, second in zip(hands, deal(packs, values, dp_size), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_step_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 packs does not split over 2"):
        deal(np.arange(3), np.ones(3, dtype=np.int64), 2)


def test_kinds_of_packs_do_not_come_in_runs() -> None:
    order = PackOrder([100] * 100 + [200] * 100, seed=3, digest="d", global_batch_size=2)
    dear = [bool(order.costs[order.packs(step * 2)[0]] > 100) for step in range(100)]
    longest = max(len(list(run)) for _, run in itertools.groupby(dear))
    assert longest < 15, "half of the steps are dear: a run of 15 of a hundred is one chance in a thousand"
