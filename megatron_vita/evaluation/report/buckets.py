"""Results counted by length of the video and by category, as the published tables are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vita.data.media.names import natural_key
from megatron_vita.evaluation.score import Tally

BUCKETS = ("duration", "category")
"""Fields of a question that its results are counted by."""
NAMED = ("short", "medium", "long")
"""Durations of Video-MME, in order."""
EDGES = (8, 15, 60, 180, 600, 900, 3600)
"""Seconds at which ranges end. LongVideoBench's questions fall into 8-15, 15-60, 180-600 and 900-3600."""


def duration(value: Any) -> tuple[Any, str]:
    """(sort key, name) of a video's duration: seconds get a range, whose upper end belongs to it; names stay.

    Names are those of Video-MME in its order, then any other, 8-15 before 15-60.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        name = str(value)
        return (NAMED.index(name) if name in NAMED else len(NAMED), natural_key(name)), name
    place = bisect_left(EDGES, value)
    low = EDGES[place - 1] if place else 0
    name = f"{low}-{EDGES[place]} s" if place < len(EDGES) else f">{low} s"
    return (low, natural_key(name)), name


def by_bucket(results: Iterable[Mapping[str, Any]], bucket: str) -> dict[str, Tally]:
    """Name of the bucket -> its results counted, in order: durations by length, categories by name (2 before 10).

    Args:
        results: lines of an evaluation; those without the field are not counted.
        bucket: one of BUCKETS.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    order: dict[str, Any] = {}
    for result in results:
        value = result["fields"].get(bucket)
        if value is not None and value != "":
            key, name = duration(value) if bucket == "duration" else (natural_key(str(value)), str(value))
            order[name] = key
            found.setdefault(name, []).append(result)
    return {name: Tally.of(found[name]) for name in sorted(found, key=lambda name: (order[name], name))}
