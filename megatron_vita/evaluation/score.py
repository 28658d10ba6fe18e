"""Statistics of scores: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

RIGHT, PARTIAL, WRONG, UNREADABLE = "right", "partial", "wrong", "unreadable"
"""Verdicts of a result line. Partial: a score between 0 and 1. Unreadable: a medium or line was damaged, so nothing was
asked; counts as wrong."""

DEPTH_BANDS = 5
"""Equal parts of a video or text that a needle's depth (0 first, 1 last) is counted in."""


def verdict(score: float) -> str:
    """The verdict on an answer of this score."""
    return RIGHT if score == 1 else WRONG if score == 0 else PARTIAL


def score_of(result: Mapping[str, Any]) -> float:
    """Score of a result line; those written before there were scores have verdicts alone."""
    return float(result.get("score", result["verdict"] == RIGHT))


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95% by default); it stays within [0, 1] and is sound for few trials.

    For a mean of scores between 0 and 1 it is wide enough: none of that mean has more variance than zeros and ones.

    Args:
        right: successes, or the sum of the scores, 0 <= right <= count.
        count: trials; 0 gives (0, 1), for nothing is known.
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def depth_band(depth: float, bands: int = DEPTH_BANDS) -> int:
    """Which of `bands` equal parts a depth in [0, 1] falls into, from 0; depth 1 belongs to the last."""
    return min(int(depth * bands), bands - 1)


@dataclass(frozen=True, slots=True)
class Tally:
    """Answers counted."""

    count: int
    right: int
    """Answers of score 1."""
    unreadable: int = 0
    score: float = 0.0
    """Sum of the scores."""

    @classmethod
    def of(cls, results: Iterable[Mapping[str, Any]]) -> Tally:
        """Count result lines; those of a circle are one."""
        found = _circles(results)
        verdicts = [result["verdict"] for result in found]
        total = math.fsum(map(score_of, found))
        return cls(len(found), verdicts.count(RIGHT), verdicts.count(UNREADABLE), total)

    @property
    def accuracy(self) -> float:
        """Mean score over all questions, unreadable ones included (as 0); 0 without questions."""
        return self.score / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a summary: counts, accuracy and its 95% Wilson interval."""
        low, high = wilson(self.score, self.count)
        return {
            "count": self.count,
            "right": self.right,
            "unreadable": self.unreadable,
            "accuracy": round(self.accuracy, 6),
            "low": round(low, 6),
            "high": round(high, 6),
        }


def _circles(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Results, of those with the same `circle` only the one with the least score.

    So MMBench counts: a question is asked with its options rotated, and is right if it is right each time.
    """
    found: dict[object, Mapping[str, Any]] = {}
    for number, result in enumerate(results):
        circle = result["fields"].get("circle")
        part = (result["model"], result["data"], result["zero_tiles"], result.get("max_frames"), circle)
        key = number if circle is None else part
        if key not in found or score_of(result) < score_of(found[key]):
            found[key] = result
    return list(found.values())
