"""Every pair of values that go together stands in some choice."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checks.pairs import cover


@st.composite
def spaces(draw: Any) -> tuple[list[dict[str, int]], dict[str, tuple[int, ...]]]:
    """Some combinations of up to four options, and up to three options that go with everything."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    every = [dict(zip("abcd", values, strict=False)) for values in product(*(range(size) for size in sizes))]
    kept = draw(st.lists(st.sampled_from(every), min_size=1, max_size=30, unique_by=str))
    free = draw(st.lists(st.integers(1, 4), max_size=3))
    return kept, {name: tuple(range(size)) for name, size in zip("xyz", free, strict=False)}


def together(choice: dict[str, Any], strength: int) -> set[Any]:
    return set(combinations(sorted(choice.items()), strength))


@settings(max_examples=60, deadline=None)
@given(spaces(), st.sampled_from([1, 2]))
def test_all_that_go_together_are_held(space: Any, strength: int) -> None:
    bound, free = space
    choices = cover(bound, free, strength)
    every = [{**one, **dict(zip(free, values, strict=True))} for one in bound for values in product(*free.values())]
    wanted = set().union(*(together(one, strength) for one in every))
    held = set().union(*(together(one, strength) for one in choices)) if choices else set()
    assert held == wanted
    assert all(one in every for one in choices), "a choice that is not allowed"


def test_it_is_always_the_same() -> None:
    bound = [{"a": a, "b": b} for a in range(4) for b in range(4) if a != b]
    free = {"x": (0, 1, 2), "y": (True, False)}
    assert cover(bound, free) == cover(bound, free)
    assert len(cover(bound, free)) <= 15, "12 combinations of a and b, and little more"


def test_nothing_allowed_is_no_choice() -> None:
    assert cover([], {"x": (0, 1)}) == []
