"""Tasks that compare numbers: ChartQA's relaxed accuracy."""

from __future__ import annotations

import re
import unicodedata

from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks.score import Score

TOLERANCE = 0.05
"""Share of the gold number by which an answer may be off."""
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s?%?")
"""A numeral with or without groups of three, fraction, exponent, percent sign."""


def relaxed_accuracy(answer: str, question: Question) -> Score:
    """1 if the answer is within 5 % of a gold number, or equal to a gold text but for letter case.

    Source: Masry et al., ChartQA (2022), section 5.1; pix2struct's `relaxed_correctness`, which lmms-eval and
    VLMEvalKit share. As there, `N%` is N / 100, so that 50% is 0.5 and not 50, and a year is a number like any other:
    2012 counts where 2010 is gold. Beyond it, numerals that mean the same are the same: groups of thousands (1,234 is
    1234), digits of other scripts and the minus sign U+2212 are read, and where 0 is gold, 0.0 is right. What is no
    plain numeral (nan, inf, 1_000, $5, 5 apples) is text, and a full stop behind it counts.
    """
    found = _plain(answer)
    return Score(float(any(_agree(found, _plain(gold)) for gold in question.golds)), found)


def _agree(found: str, gold: str) -> bool:
    number, wanted = to_number(found), to_number(gold)
    if number is None or wanted is None:
        return found.lower() == gold.lower()
    return number == wanted if wanted == 0 else abs(number - wanted) / abs(wanted) <= TOLERANCE


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()


def to_number(text: str) -> float | None:
    """The number that a numeral means (`50%` is 0.5); None where the text is no numeral."""
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "").rstrip("%"))
    return value / 100 if text.endswith("%") else value
