"""Select the cases of a grid by a filter."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from megatron_vita.checks.options import Case, free_options, layout_options, layouts, shown
from megatron_vita.checks.pairs import cover
from megatron_vita.checks.tiny import VITS
from megatron_vita.config.parallel import CP_COMM_TYPES
from megatron_vita.errors import ConfigError

_STRENGTH = {"small": 1, "full": 2}
STRICTEST = ("freeze", "dtype")
"""Options whose first value is the strictest test: every gradient, in float64. Pairs of other options are covered with
these values."""
EXTRA: tuple[dict[str, tuple[Any, ...]], ...] = (
    # Ranks that have nothing to differentiate while others have: one that skips a collective lets the others wait for
    # ever.
    {
        "cp": (2,),
        "comm": CP_COMM_TYPES,
        "images": ("one-rank", "one-batch", "none"),
        "freeze": ("stage-1",),
        "recompute": ("none", "full"),
    },
    # The table's gradient is summed over the first and the last stage.
    {"pp": (2, 4), "vp": (1, 2), "split": ("even", "uneven"), "tied": (True,)},
    # Gradients of the tower are summed over the tensor ranks by us, or not at all where it is split.
    {"tp": (2,), "sp": (False, True), "tower": ("spread", "split"), "vit": tuple(VITS), "images": ("one-rank",)},
    # Norms of the same names in decoder and tower, some of them replicated, some split, some with part of the tokens.
    {"tp": (2,), "sp": (False, True), "tower": ("spread", "split"), "vit": ("intern_vit_6b",), "llm": ("qwen3",)},
)
"""Parts of the full grid with every combination of their values, not only pairs."""


@dataclass(frozen=True)
class Spec:
    """A parsed `--grid`."""

    strength: int | None = None
    """2: every compatible pair of values; 1: every value; none: every combination of the chosen values."""
    chosen: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options restricted to some of their values."""


def parse_spec(text: str, worlds: Sequence[int], dtypes: str | None = None) -> Spec:
    """Read `full`, `small`, `tp=2 cp=2,4 comm=p2p`, or one of the words followed by choices.

    Args:
        text: of `--grid`.
        worlds: how many ranks a case may take.
        dtypes: of `--dtype`: the same as `dtype=...` in the text.

    Raises:
        ConfigError: an option or a value that does not exist, naming those that do.
    """
    words = text.split() + ([f"dtype={dtypes}"] if dtypes else [])
    strength = _STRENGTH[words.pop(0)] if words and words[0] in _STRENGTH else None
    options = {**layout_options(worlds), **free_options()}
    chosen: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or name not in options:
            close = difflib.get_close_matches(name, [*options, *_STRENGTH], n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]}?" if close else f"Options: {', '.join(options)}."
            raise ConfigError(f"--grid: {word!r} is neither small, full, nor OPTION=VALUE. {hint}")
        if name in chosen:
            raise ConfigError(f"--grid: {name} is given twice. Write {name}=A,B for several values.")
        known = {shown(value): value for value in options[name]}
        for value in values.split(","):
            if value not in known:
                raise ConfigError(f"--grid: {name}={value}: choose of {', '.join(known)}.")
        chosen[name] = tuple(known[value] for value in values.split(","))
    return Spec(strength if chosen or strength else _STRENGTH["full"], chosen)


def make_cases(spec: Spec, worlds: Sequence[int]) -> list[Case]:
    """The cases of a grid, sorted by the number of ranks.

    Args:
        spec: the filter. Without a strength, options that are not chosen take their first compatible value.
        worlds: how many ranks a case may take.

    Raises:
        ConfigError: no case is left; with the reason.
    """
    allowed, rejected = _allowed(spec, worlds)
    if not allowed:
        reason = min(rejected.values(), key=lambda one: "says nothing" in one, default=_too_many(worlds))
        raise ConfigError(f"--grid: no case is left: {reason}")
    bound_names = tuple(layout_options(worlds))
    free = {name: spec.chosen.get(name, values) for name, values in free_options().items()}
    if spec.strength is None:
        found = list(_combinations(spec, allowed))
    else:
        bound = [{name: getattr(case, name) for name in bound_names} for case in allowed]
        found = [Case(**choice) for choice in _covered(bound, free, spec.strength)]
        for extra in EXTRA if spec.strength == 2 else ():
            every = Spec(None, {name: _common(values, spec, name) for name, values in extra.items()})
            found += _combinations(every, allowed)
        if Case() in allowed:  # one process through megatron-core: what fails there is not the layout's fault
            found += [Case(dtype=dtype) for dtype in free["dtype"]]
    return sorted(dict.fromkeys(found), key=lambda case: (case.world_size, len(case.chosen())))


def _covered(
    bound: Sequence[dict[str, Any]], free: dict[str, tuple[Any, ...]], strength: int
) -> Iterator[dict[str, Any]]:
    """Cases that cover all pairs (or values); pairs without an option of STRICTEST take its strictest value."""
    if strength == 1:
        yield from cover(bound, free, 1)
        return
    yield from cover(bound, {name: values[:1] if name in STRICTEST else values for name, values in free.items()}, 2)
    for name in STRICTEST:
        for value in free[name][1:]:
            yield from cover(bound, {**free, name: (value,)}, 1)  # the value with every value of every other option


def excluded(spec: Spec, worlds: Sequence[int]) -> dict[str, list[str]]:
    """Excluded combinations by reason: pairs of values that no case combines; without a strength,
    combinations of the chosen values."""
    allowed, rejected = _allowed(spec, worlds)
    options = {name: spec.chosen.get(name, values) for name, values in layout_options(worlds).items()}
    groups: list[tuple[str, ...]] = list(combinations(options, 2))
    if spec.strength is None:
        groups = [tuple(name for name in options if name in spec.chosen)]
    held = {one for case in allowed for one in _held(case, groups)}
    reasons: dict[Any, str] = {}
    for case, reason in sorted(rejected.items(), key=lambda one: "says nothing" in one[1]):  # settings explain more
        for one in _held(case, groups):
            if one not in held:
                reasons.setdefault(one, reason)
    out: dict[str, list[str]] = {}
    for names in groups:
        for values in product(*(options[name] for name in names)):
            one = tuple(zip(names, values, strict=True))
            if one not in held:
                text = " ".join(f"{name}={shown(value)}" for name, value in one)
                out.setdefault(reasons.get(one, _too_many(worlds)), []).append(text)
    return out


def _held(case: Case, groups: Sequence[tuple[str, ...]]) -> Iterator[Any]:
    """The case's values of each group of options."""
    return (tuple((name, getattr(case, name)) for name in names) for names in groups)


def _too_many(worlds: Sequence[int]) -> str:
    sizes = " or ".join(str(size) for size in worlds)
    return f"the degrees do not multiply to {sizes} ranks"


def _common(values: tuple[Any, ...], spec: Spec, name: str) -> tuple[Any, ...]:
    """The values of an option that the filter keeps."""
    return tuple(value for value in values if value in spec.chosen.get(name, values))


def _allowed(spec: Spec, worlds: Sequence[int]) -> tuple[list[Case], dict[Case, str]]:
    """Allowed layouts, and rejected ones with reasons; the simplest first in both."""
    fitting = [
        (case, reason)
        for case, reason in layouts(tuple(worlds))
        if all(getattr(case, name) in values for name, values in spec.chosen.items() if name not in free_options())
    ]
    return [case for case, reason in fitting if reason is None], {case: reason for case, reason in fitting if reason}


def _combinations(spec: Spec, allowed: Sequence[Case]) -> Iterator[Case]:
    """The simplest allowed case for every combination of chosen values, where there is one."""
    free = {name: values for name, values in spec.chosen.items() if name in free_options()}
    named = [name for name in spec.chosen if name not in free]
    simplest: dict[Any, Case] = {}
    for case in allowed:
        simplest.setdefault(tuple(getattr(case, name) for name in named), case)
    for values in product(*(spec.chosen[name] for name in named)):
        for others in product(*free.values()):
            if values in simplest:
                settings = {name: getattr(simplest[values], name) for name in Case.__dataclass_fields__}
                yield Case(**{**settings, **dict(zip(free, others, strict=True))})
