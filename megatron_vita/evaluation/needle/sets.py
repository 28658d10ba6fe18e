"""The sets of questions of a needle grid, one for each length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.grid import Grid
from megatron_vita.evaluation.needle.needles import Choose, given, numbered_city, numbered_page, read_needles
from megatron_vita.evaluation.needle.text import TextNeedles, costs_of, prose
from megatron_vita.evaluation.needle.visual import Haystack, VisualNeedles, open_haystack
from megatron_vita.evaluation.questions import Question, QuestionSet
from megatron_vita.inference.opening import open_for_inference
from megatron_vita.inference.settings import EngineSettings


def visual_sets(
    frames: Sequence[int],
    grid: Grid,
    folder: Path,
    *,
    haystack: Path | None = None,
    needles: Path | None = None,
    media_root: Path | None = None,
) -> list[QuestionSet]:
    """A set of questions about clips of each length.

    Args:
        frames: lengths of the clips, each at least 2.
        grid: depths and samples.
        folder: for pictures that are drawn, or written of a video.
        haystack: a folder of frames, or a video; None: drawn scenes.
        needles: a JSON Lines file of {"image", "question", "answer"}; None: pages with a number.
        media_root: see `read_needles`.

    Raises:
        ConfigError: a length that cannot be. When a set is read also, and DataError, what is wrong with haystack or
            needles.
    """
    lengths = _lengths("--frames", frames, 2)

    @cache
    def material() -> tuple[Haystack, Choose]:
        found = read_needles(needles, "visual", media_root=media_root) if needles else None
        needle = given(found, grid) if found else numbered_page(grid, folder / "numbers")
        return open_haystack(haystack, folder, lengths[-1], grid.seed), needle

    def read(length: int, limit: int | None) -> Sequence[Question]:
        return _first(VisualNeedles(grid, length, *material()), limit)

    return [QuestionSet(f"needle visual {n} frames", partial(read, n), n) for n in lengths]


def text_sets(
    tokens: Sequence[int],
    grid: Grid,
    models: Sequence[str],
    *,
    haystack: Path | None = None,
    needles: Path | None = None,
) -> list[QuestionSet]:
    """A set of questions about texts of each length.

    Args:
        tokens: lengths of the texts.
        grid: depths and samples.
        models: those that are asked; their tokenizer counts.
        haystack: a text file; None: generated prose.
        needles: a JSON Lines file of {"text", "question", "answer"}; None: secret numbers of cities.

    Raises:
        ConfigError: a length that cannot be. When a set is read also what is wrong with haystack, needles or models, or
            models that count differently.
    """
    lengths = _lengths("--lengths", tokens, 1)

    @cache
    def material() -> tuple[Sequence[str], Choose, VitaTokenizer, npt.NDArray[np.int64]]:
        tokenizer, *others = (
            VitaTokenizer.load(open_for_inference(model, EngineSettings()).tokenizer_dir) for model in models
        )
        if not all(tokenizer.same_ids(other) for other in others):
            raise ConfigError(
                "a text needle's length is counted by one tokenizer, but these models have several. Evaluate them one "
                "by one."
            )
        needle = given(read_needles(needles, "text"), grid) if needles else numbered_city(grid)
        sentences = prose(haystack, grid.seed)
        return sentences, needle, tokenizer, costs_of(sentences, tokenizer)

    def read(length: int, limit: int | None) -> Sequence[Question]:
        return _first(TextNeedles(grid, length, *material()), limit)

    return [QuestionSet(f"needle text {n} tokens", partial(read, n)) for n in lengths]


def _first(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """The first `limit` questions; all are left to be made later."""
    return questions if limit is None or limit >= len(questions) else questions[:limit]


def _lengths(flag: str, lengths: Sequence[int], least: int) -> list[int]:
    if not lengths or min(lengths) < least:
        raise ConfigError(f"{flag} {' '.join(map(str, lengths))}: give the lengths of the haystacks, from {least} on.")
    return sorted(set(lengths))
