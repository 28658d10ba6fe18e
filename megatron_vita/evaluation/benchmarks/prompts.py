"""Prompts around a benchmark's question, in three styles.

`vlmevalkit`: VLMEvalKit's `build_prompt`. `long_vita`: that, as the paper's wrapper for VLMEvalKit rewrites it
(VITA-MLLM/Long-VITA, VLMEvalKit/long_vita.py). `lmms_eval`: lmms-eval's `doc_to_text` with the default suffix of the
task's YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

Style = Literal["long_vita", "vlmevalkit", "lmms_eval"]
STYLES: tuple[Style, ...] = get_args(Style)

LETTER = "Answer with the letter."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
SHORT = "Offer a very short reply."
_SELECT = "Please select the correct answer from the options above."
_IMAGE = re.compile(r"<image (\d+)>")


def listed(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options, a line each."""
    return "\n".join(form.format(chr(ord("A") + number), option) for number, option in enumerate(options))


def choice(style: Style, question: str, options: Sequence[str], hint: str = "", suffix: str = LETTER) -> str:
    """A question about pictures with options, or without, as VLMEvalKit's ImageMCQDataset writes it.

    Args:
        style: `vlmevalkit` or `long_vita`.
        question: the question.
        options: texts of A, B, ...
        hint: what is said before it.
        suffix: what `long_vita` says instead of "Please select ...".
    """
    whole = (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\n"
    if options:
        whole += f"Options:\n{listed(options)}\n{_SELECT} \n"
    return f"{whole.replace(_SELECT, '').strip()}\n{suffix}" if style == "long_vita" else whole


def pictured(style: Style, prompt: str, count: int = 1) -> tuple[str | int, ...]:
    """Pictures, then the text; in the paper's wrapper each picture ends with a line break."""
    behind = "\n" if style == "long_vita" else ""
    return (*(piece for number in range(count) for piece in (number, behind)), prompt)


def interleaved(style: Style, prompt: str, count: int) -> tuple[str | int, ...]:
    """A text with its pictures in the places of `<image 1>`, ...; before it where it names none."""
    pieces = _IMAGE.split(prompt)
    if len(pieces) == 1:
        return pictured(style, prompt, count)
    behind = "\n" if style == "long_vita" else ""
    return tuple(
        int(piece) - 1 if number % 2 else (behind if number else "") + piece for number, piece in enumerate(pieces)
    )


def named_pictures(prompt: str) -> tuple[int, ...]:
    """Numbers of the pictures that a text names, from 0, each once."""
    return tuple(sorted({int(number) - 1 for number in _IMAGE.findall(prompt)}))
