"""Pairwise testing: few choices that together cover every compatible pair of values."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

Value = Hashable
Choice = dict[str, Value]
Target = tuple[tuple[str, Value], ...]
"""A combination of values that some choice must cover, options in order."""

_CANDIDATES = 64
"""Candidates that are compared for a choice: more of them save few choices and cost time."""


def cover(bound: Sequence[Mapping[str, Value]], free: Mapping[str, Sequence[Value]], strength: int = 2) -> list[Choice]:
    """Choices that cover every compatible combination of `strength` values; greedy (not minimal) and deterministic.

    Args:
        bound: every allowed combination of the options that restrain one another, all with the same keys.
        free: the options that go with everything, and their values.
        strength: 2 for all pairs, 1 for every value once.

    Returns:
        complete choices; each agrees in its bound options with one of `bound`.
    """
    if not bound:
        return []
    missing = dict.fromkeys(_targets(bound, free, strength))  # a set that keeps its order
    choices = []
    while missing:
        target = next(iter(missing))
        choice = _best(bound, free, target, missing, strength)
        choices.append(choice)
        for held in combinations(choice.items(), strength):
            missing.pop(held, None)
    return choices


def _targets(
    bound: Sequence[Mapping[str, Value]], free: Mapping[str, Sequence[Value]], strength: int
) -> Iterator[Target]:
    """All combinations to cover, with repetitions."""
    loose = [(name, value) for name, values in free.items() for value in values]
    for size in range(strength + 1):
        tails = [tail for tail in combinations(loose, strength - size) if len({name for name, _ in tail}) == len(tail)]
        heads: Iterable[Target] = dict.fromkeys(head for one in bound for head in combinations(one.items(), size))
        for head in heads:
            for tail in tails:
                yield (*head, *tail)


def _best(
    bound: Sequence[Mapping[str, Value]],
    free: Mapping[str, Sequence[Value]],
    target: Target,
    missing: Mapping[Target, None],
    strength: int,
) -> Choice:
    """The choice that covers `target` and, greedily, as many of the missing combinations as possible."""
    wanted = dict(target)
    fitting = [one for one in bound if all(one.get(name, value) == value for name, value in target)]
    step = -(-len(fitting) // _CANDIDATES)
    best: tuple[int, Choice] = (-1, {})
    for one in fitting[::step]:
        choice = dict(one)
        gain = sum(held in missing for held in combinations(choice.items(), strength))
        for name, values in free.items():
            options = [wanted[name]] if name in wanted else values
            gains = [_gain(choice, name, value, missing, strength) for value in options]
            gain += max(gains)
            choice[name] = options[gains.index(max(gains))]
        if gain > best[0]:
            best = (gain, choice)
    return best[1]


def _gain(choice: Choice, name: str, value: Value, missing: Mapping[Target, None], strength: int) -> int:
    """Number of missing combinations that the value would add to a choice."""
    return sum((*held, (name, value)) in missing for held in combinations(choice.items(), strength - 1))
