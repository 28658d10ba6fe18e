"""MMMU: multiple choice, and open questions whose answer is a number or a phrase.

Source of the rules for open questions: MMMU's evaluation (eval_utils.py: parse_open_response, normalize_str,
eval_open), which lmms-eval repeats.
"""

from __future__ import annotations

import re

from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks.multiple_choice import multiple_choice
from megatron_vita.evaluation.tasks.score import Score

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""The answer stands behind one of them; in the last line also behind `=`."""
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With groups of three, with an exponent, plain."""


def mmmu(answer: str, question: Question) -> Score:
    """Multiple choice where the question has options; else 1 if a number or phrase of the answer is a gold one.

    Of an open question, what stands behind the last `is`, `answer`, `=` and the like of each line counts, and every
    number in it: a number is right if it is a gold one to two decimals, a phrase if it contains a gold one.
    """
    if question.options:
        return multiple_choice(answer, question)
    phrases = _key_phrases(answer)
    said = {one for phrase in phrases for piece in (phrase, *_numbers(phrase)) for one in _normalised(piece)}
    wanted = {one for gold in question.golds for one in _normalised(gold)}
    right = any(
        (isinstance(one, str) and isinstance(gold, str) and gold in one) or (isinstance(one, float) and one == gold)
        for one in said
        for gold in wanted
    )
    return Score(float(right), "; ".join(phrases) or None)


def _key_phrases(answer: str) -> list[str]:
    """The shortest end of each line behind an indicator; the whole answer where there is none."""
    whole = answer.strip().strip(".").lower()
    found = []
    lines = whole.split("\n")
    for number, text in enumerate(lines, 1):
        ends = [
            text.rsplit(indicator, 1)[1].strip()
            for indicator in (*_INDICATORS, *(["="] if number == len(lines) else []))
            if indicator in text
        ]
        shortest = min(ends, key=len, default="")
        if shortest and shortest not in ":,.!?;'":
            found.append(shortest)
    return found or ([whole] if whole else [])


def _numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _normalised(text: str) -> list[str | float]:
    """A number to two decimals, or a phrase in small letters; one letter with a blank, lest it is found everywhere."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text] if text else []
