"""Packing: nothing lost, nothing split, no pack over capacity, the same answer every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.data.shards.writer.packing import fill, pack
from megatron_vita.errors import DataError
from tests.scripts import load_script

samples = load_script("benchmarks/mix.py").samples


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 5000))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def simple_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook rule, item by item."""
    packs: list[tuple[int, list[int]]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [p for p in range(len(packs)) if packs[p][0] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda p: packs[p][0])
            packs[best] = (packs[best][0] - lengths[item], [*packs[best][1], item])
        else:
            packs.append((capacity - lengths[item], [item]))
    return [items for _, items in packs]


@given(problems())
def test_whole_items_once_within_capacity_in_input_order(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    packs = pack(lengths, capacity)
    assert sorted(item for one in packs for item in one) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in one) <= capacity for one in packs)
    assert all(one == sorted(one) for one in packs)
    assert [one[0] for one in packs] == sorted(one[0] for one in packs)
    assert pack(np.array(lengths, dtype=np.int32), capacity) == packs


@given(problems())
def test_counting_by_length_equals_the_textbook_rule(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem

    def held(packs: list[list[int]]) -> list[int]:  # between equally full packs either choice is the rule's
        return sorted(sum(lengths[item] for item in one) for one in packs)

    assert held(pack(lengths, capacity)) == held(simple_best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize("wrong", [[3, 0], [3, 11]])
def test_an_item_that_fits_no_pack_is_named(wrong: list[int]) -> None:
    with pytest.raises(DataError, match="item 1 has"):
        pack(wrong, 10)


@pytest.mark.parametrize(("capacity", "long"), [(16384, False), (32768, False), (131072, True)])
def test_packs_of_a_realistic_mix_are_full(capacity: int, long: bool) -> None:
    lengths, _ = samples(50_000, capacity, long=long)
    assert fill(lengths, pack(lengths, capacity), capacity) >= 0.995
