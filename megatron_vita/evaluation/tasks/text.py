"""Tasks that compare texts: exact match, ANLS, containment."""

from __future__ import annotations

import re

from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks.score import Score

ANLS_THRESHOLD = 0.5
"""Similarities below count as 0: the answer is another one, not one that was misread."""
_FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")
"""Category, or data set, of OCRBench whose answers are LaTeX: case counts there and blanks do not."""


def exact_match(answer: str, question: Question) -> Score:
    """1 if the answer is one of the gold answers, except for white space at both ends and its amount between words."""
    found = _words(answer)
    return Score(float(any(found == _words(gold) for gold in question.golds)), found)


def anls(answer: str, question: Question) -> Score:
    """Average normalised Levenshtein similarity of DocVQA, for one question: the best over the gold answers.

    1 - distance / length of the longer text, and 0 where that is below 0.5; letter case and the amount of white space
    do not count. Source: Biten et al., Scene Text Visual Question Answering (2019), equation 1, as VLMEvalKit's
    `anls_compute` and lmms-eval's `anls` compute it: a similarity of exactly 0.5 counts, which the paper's inequality
    leaves out. (lmms-eval divides by the length before white space is removed; that differs only if there was any.)
    """
    found = _words(answer).lower()
    best = max(_similarity(found, _words(gold).lower()) for gold in question.golds)
    return Score(best if best >= ANLS_THRESHOLD else 0.0, found)


def ocrbench(answer: str, question: Question) -> Score:
    """1 if a gold answer is contained in the answer, as OCRBench counts.

    Letter case does not count and a line break is a blank; of formulas (LaTeX) case counts and blanks do not. Source:
    VLMEvalKit's OCRBench.evaluate. (lmms-eval lowers the answer of a formula but not the gold one, so that none with a
    capital can be right; that is not followed.) An empty gold answer, which every text contains, is never right.
    """
    formula = any(question.fields.get(key) in _FORMULAS for key in ("category", "dataset"))

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    found = plain(answer)
    return Score(float(any(gold and gold in found for gold in map(plain, question.golds))), found)


def needle(answer: str, question: Question) -> Score:
    """1 if a gold answer is contained in the answer as whole words, whatever the letter case: the needle was found.

    Numbers may be written in groups of thousands: 7,305 is 7305. A part of a longer word or number is not enough.
    """
    found = _ungrouped(answer)
    return Score(float(any(_holds(found, _ungrouped(gold)) for gold in question.golds)), found)


def _ungrouped(text: str) -> str:
    return _words(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))


def _holds(text: str, wanted: str) -> bool:
    pattern = rf"(?<!\w)(?<!\d\.){re.escape(wanted)}(?!\w|\.\d)"
    return bool(wanted) and re.search(pattern, text, re.IGNORECASE) is not None


def _words(text: str) -> str:
    """A text with single blanks between its words."""
    return " ".join(text.split())


def _similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for two empty ones."""
    longest, shortest = max(len(one), len(other)), min(len(one), len(other))
    if shortest < ANLS_THRESHOLD * longest:
        return 0.0  # the distance is at least the difference in length: it cannot reach the threshold
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character that turn one text into the other."""
    costs = list(range(len(other) + 1))
    for row, character in enumerate(one, 1):
        diagonal, costs[0] = costs[0], row
        for column, wanted in enumerate(other, 1):
            diagonal, costs[column] = (
                costs[column],
                min(diagonal + (character != wanted), costs[column] + 1, costs[column - 1] + 1),
            )
    return costs[-1]
