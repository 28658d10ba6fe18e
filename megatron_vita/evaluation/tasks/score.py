"""The verdict of a task on one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """How right an answer is."""

    value: float
    """In [0, 1]; 1 is right."""
    extracted: str | None = None
    """What was taken as the answer (the letter of an option, the text compared); None: no answer could be inferred."""
