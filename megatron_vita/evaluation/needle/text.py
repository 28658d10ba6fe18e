"""Text needles: a sentence at a depth of a text of T tokens, counted with the model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from megatron_vita.data.sample import Message, Sample, Text
from megatron_vita.data.text.chat_tokenizer import ChatTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.grid import Grid
from megatron_vita.evaluation.needle.needles import NEEDLE, Choose, Needle
from megatron_vita.evaluation.questions import Question

_SENTENCES = 4096
"""Generated sentences that differ; a longer text repeats them."""
_LONGEST = 60
"""Words of a sentence; a longer one is cut into several."""
_START = 4
"""Purpose of a draw."""

_WHO = (
    "the baker", "a young sailor", "my neighbour", "the old gardener", "a tall clerk", "the pianist", "a tired nurse",
    "the ferryman", "our teacher", "a quiet painter", "the postwoman", "a retired judge", "the glazier", "a farmer",
    "the night guard", "a watchmaker",
)  # fmt: skip
_DOES = (
    "mends", "paints", "carries", "sells", "polishes", "borrows", "admires", "sketches", "repairs", "collects",
    "forgets", "describes", "washes", "measures", "hides", "weighs",
)  # fmt: skip
_WHAT = (
    "a wooden boat", "the copper kettle", "a basket of pears", "an empty frame", "the garden gate", "a woollen coat",
    "the church bell", "a pair of boots", "a stack of letters", "the broken clock", "a clay jug", "the long ladder",
    "a silver spoon", "an iron key", "the kitchen table", "a bundle of reeds",
)  # fmt: skip
_WHEN = (
    "before sunrise", "on market days", "when it rains", "near the harbour", "behind the mill", "after supper",
    "in late autumn", "without a word", "along the canal", "for a friend", "once a month", "under the lime trees",
    "with great care", "by candlelight", "during the fair", "on the way home",
)  # fmt: skip


class TextNeedles(Sequence[Question]):
    """The questions of one length, made when they are asked for: all texts at once would not fit into memory."""

    def __init__(
        self,
        grid: Grid,
        tokens: int,
        sentences: Sequence[str],
        needle: Choose,
        tokenizer: ChatTokenizer,
        costs: npt.NDArray[np.int64],
    ) -> None:
        """No text is made.

        Args:
            grid: depths and samples.
            tokens: T, most tokens of a text with its needle. It is shorter by less than a sentence.
            sentences: prose that a text takes a run of, from a place that is drawn; from the beginning again
                behind the last.
            needle: of each question.
            tokenizer: counts.
            costs: what `costs_of(sentences, tokenizer)` gives.

        Raises:
            ConfigError: a needle that is longer than the text.
        """
        self._grid, self._tokens, self._sentences, self._needle = grid, tokens, sentences, needle
        self._tokenizer = tokenizer
        self._costs = costs
        for cell in grid:
            if (cost := self._cost(needle(*cell))) > tokens:
                raise ConfigError(f"--lengths {tokens}: the needle {needle(*cell).text!r} alone has {cost} tokens.")

    def __len__(self) -> int:
        return len(self._grid)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        depth, sample = self._grid.cell(index)
        needle, line = self._needle(depth, sample), self._grid.line(depth, sample)
        start = int(self._grid.draw(depth, sample, _START).integers(len(self._sentences)))
        ends = self._ends(start, self._tokens - self._cost(needle))
        # the boundary between sentences, or before the first, that is nearest to the depth
        boundary = int(np.abs(np.concatenate(([0], ends)) - depth * (ends[-1] if len(ends) else 0)).argmin())
        text = [self._sentences[(start + number) % len(self._sentences)] for number in range(len(ends))]
        text.insert(boundary, needle.text)
        name = f"needle of {self._tokens} tokens, depth {depth:g}, sample {sample + 1}"
        turn = Message("user", (Text(" ".join(text) + "\n" + needle.question),))
        return Question(
            Sample((turn,), source=name, line=line),
            needle.answer,
            line,
            {"needle": "text", "tokens": self._tokens, "depth": depth, "sample": sample},
            task=NEEDLE,
        )

    def _cost(self, needle: Needle) -> int:
        return int(costs_of([needle.text], self._tokenizer)[0])

    def _ends(self, start: int, room: int) -> npt.NDArray[np.int64]:
        """Tokens up to the end of each sentence that fits into `room`, from sentence `start` on."""
        once = np.cumsum(np.roll(self._costs, -start))
        rounds = room // int(once[-1]) + 1
        ends = (np.arange(rounds)[:, None] * once[-1] + once).reshape(-1)
        return ends[ends <= room]


def costs_of(sentences: Sequence[str], tokenizer: ChatTokenizer) -> npt.NDArray[np.int64]:
    """Tokens of each sentence behind another, `[len(sentences)]`: a blank stands before it."""
    return np.array([len(tokenizer.encode(" " + one)) for one in sentences], dtype=np.int64)


def prose(haystack: Path | None, seed: int) -> list[str]:
    """Sentences to hide a needle among.

    Args:
        haystack: a text file; None: generated sentences.
        seed: of their order.

    Raises:
        ConfigError: the file cannot be read, or has no word in it.
    """
    if haystack is None:
        return _generated(seed)
    try:
        text = haystack.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{haystack}: not a text file in UTF-8 ({error}). Check --haystack.") from None
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        sentences += [" ".join(words[start : start + _LONGEST]) for start in range(0, len(words), _LONGEST)]
    if not sentences:
        raise ConfigError(f"{haystack}: no word in it. Check --haystack.")
    return sentences


def _generated(seed: int) -> list[str]:
    shape = tuple(len(words) for words in (_WHO, _DOES, _WHAT, _WHEN))
    chosen = np.random.default_rng(seed).choice(int(np.prod(shape)), size=_SENTENCES, replace=False)
    sentences = []
    for who, does, what, when in zip(*np.unravel_index(chosen, shape), strict=True):
        sentence = f"{_WHO[who]} {_DOES[does]} {_WHAT[what]} {_WHEN[when]}."
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences
