"""Which option an answer to a multiple-choice question means."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from megatron_vita.errors import DataError
from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks.score import Score

_LETTERS = 5
"""Letters that count where a question does not list its options: A to E."""
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_STATED = re.compile(
    r"(?:answer|option|choice)\s*(?:is|:)+\s*(?:option\s+)?[\s(\[{\"'*`]*([A-Za-z])(?![\w'])([\s\W]*)", re.IGNORECASE
)
_LEADING = re.compile(
    r"^[\s(\[{\"'*`#]*([A-Z])(?:\s*[)\]}.:*,]|\s+(?:because|since|as|is|[-\u2013\u2014])\s)", re.MULTILINE
)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_WORDS = re.compile(r"[^\s.()\[\],:;!?*#{}\"'`]+")
_ARTICLES = "AI"
"""Letters that are English words, too."""
_WORDLIKE = string.ascii_lowercase + string.digits


def multiple_choice(answer: str, question: Question) -> Score:
    """1 if the answer means the gold option.

    The gold answer is a letter or an option's text. An answer from which no single option can be inferred is wrong;
    nothing is guessed at random (which MMMU's and LongVideoBench's own code do), so that a model's share by luck is not
    added to its score.
    """
    letter = infer_option(answer, question.options)
    golds = {gold_letter(gold, question.options) for gold in question.golds}
    return Score(float(letter is not None and letter in golds), letter)


def gold_letter(gold: str, options: Sequence[str]) -> str | None:
    """The letter of a gold answer: itself, `(B)` and the like, or that of the option whose text it is."""
    alone = _ALONE.fullmatch(gold)
    if alone and alone[1].upper() in _letters(options):
        return alone[1].upper()
    return infer_option(gold, options)


def check_gold(question: Question, task: str) -> None:
    """Prove that a task can find an answer to a question right.

    Args:
        question: the question.
        task: judges it where it names no task itself, a key of TASKS.

    Raises:
        DataError: a gold answer is none of the options.
    """
    task = question.task or task
    if task != "multiple_choice" and not (task == "mmmu" and question.options):
        return
    for gold in question.golds:
        if gold_letter(gold, question.options) is None:
            known = f"its {len(question.options)} options" if question.options else "A to E; list its `options`"
            raise DataError(f"{question.sample.id}: the reference answer {gold[:80]!r} is none of {known}.")


def infer_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that an answer means; None if there is none, or several.

    What the harnesses do where they need no judge, their differences settled; VLMEvalKit of today also asks that the
    letter of rule 6 is among the last five words, which would leave out `B because ...`.

    Rules in order. In 3 to 5 the first that finds letters decides; several there are none.

    1. Nothing but a letter, of either case: `b`, `(B)`, `B.`. (VLMEvalKit, MVBench in lmms-eval)
    2. Nothing but several letters (`A and B`): none.
    3. The answer is said to be a letter: `The best answer is (B)`. (The prefixes of Video-MME and LongVideoBench)
    4. A line begins with the letter and `)`, `.`, `:`, `because`: `B. The cat`, `(B) because (A) ...`. (AI2D and
       MVBench in lmms-eval)
    5. A letter stands in brackets. (MMMU)
    6. One capital letter stands alone as a word, punctuation aside: `I think B fits`. (VLMEvalKit's `can_infer_option`)
       Not `A` and `I`, which are words, too (MMBench in lmms-eval).
    7. The answer is the text of an option, or contains that of one as whole words. (VLMEvalKit's `can_infer_text`,
       which does not ask for whole words)
    8. `A` or `I` in an answer of at most three words.

    Args:
        answer: what the model said.
        options: texts of the options A, B, ...; none: A to E are letters, and no text counts.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    letters = _letters(options)
    alone = _ALONE.fullmatch(text)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    words = _WORDS.findall(text)
    named = {word for word in words if word in letters}
    if len(named) > 1 and all(word in letters or word.lower() in ("and", "or", "&", "/", "+") for word in words):
        return None
    for found in (
        {_stated(match) for match in _STATED.finditer(text)},
        set(_LEADING.findall(text)),
        set(_BRACKETED.findall(text)),
    ):
        if found & letters:
            return next(iter(found & letters)) if len(found & letters) == 1 else None
    if len(named) == 1 and not named & set(_ARTICLES):
        return next(iter(named))
    return _by_text(text, options) or (next(iter(named)) if len(named) == 1 and len(words) <= 3 else None)


def _stated(match: re.Match[str]) -> str:
    """The letter that is said to be the answer; empty where it is rather a word (`the answer is a cat`)."""
    ends = match.end() == len(match.string) or match[2].strip()
    return match[1].upper() if ends or match[1].isupper() else ""


def _by_text(text: str, options: Sequence[str]) -> str:
    answer = _folded(text)
    texts = {letter: _folded(option) for letter, option in zip(string.ascii_uppercase, options, strict=False)}
    equal = [letter for letter, option in texts.items() if option and option.strip(" .") == answer.strip(" .")]
    if equal:
        return equal[0] if len(equal) == 1 else ""
    contained = [letter for letter, option in texts.items() if option and _contains(answer, option)]
    return contained[0] if len(contained) == 1 else ""


def _contains(text: str, option: str) -> bool:
    """Whether a text holds an option as whole words; scripts without blanks between words have none."""
    before = r"(?<![0-9a-z])" if option[0] in _WORDLIKE else ""
    behind = r"(?![0-9a-z])" if option[-1] in _WORDLIKE else ""
    return re.search(before + re.escape(option) + behind, text) is not None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _letters(options: Sequence[str]) -> frozenset[str]:
    return frozenset(string.ascii_uppercase[: len(options) or _LETTERS])
