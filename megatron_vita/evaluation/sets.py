"""Sets of questions that are asked: a file, a published benchmark, one length of a needle grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_vita.data.sample import MediaFile
from megatron_vita.data.text.chat_tokenizer import ChatTokenizer
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.needle.grid import Grid
from megatron_vita.evaluation.needle.needles import Kind, Needle, given, numbered_city, numbered_page, read_needles
from megatron_vita.evaluation.needle.text import TextNeedles, prose
from megatron_vita.evaluation.needle.visual import VisualNeedles, haystack_frames
from megatron_vita.evaluation.questions import Question, read_questions


class QuestionSet(Protocol):
    """Questions that are judged alike."""

    @property
    def name(self) -> str:
        """In results and tables."""

    @property
    def task(self) -> str:
        """What judges the answers, a key of score.TASKS."""

    @property
    def frames(self) -> int | None:
        """Most frames that the model is shown of each video; None: as many as it is made for."""

    def read(self, tokenizer: ChatTokenizer, limit: int | None) -> Sequence[Question]:
        """The questions, in an order that does not change; no medium is opened.

        Args:
            tokenizer: the model's, for those whose length it decides.
            limit: only the first so many.

        Raises:
            ConfigError, DataError: what is wrong with a file, and where.
        """


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of questions."""

    name: str
    """Its path."""
    task: str = "exact_match"
    frames: int | None = None
    media_root: Path | None = None

    def read(self, tokenizer: ChatTokenizer, limit: int | None) -> Sequence[Question]:
        return read_questions(Path(self.name), media_root=self.media_root, limit=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needles:
    """One length of a needle grid."""

    kind: Kind
    length: int
    """Frames of a clip, or tokens of a text."""
    grid: Grid
    needle: Callable[[int], Needle]
    """Of each sample."""
    pictures: Sequence[MediaFile] = ()
    """Haystack of visual needles."""
    sentences: Sequence[str] = ()
    """Haystack of text needles."""
    task: str = "needle"

    @property
    def name(self) -> str:
        return f"needle {self.kind} {self.length:,} {'frames' if self.kind == 'visual' else 'tokens'}"

    @property
    def frames(self) -> int | None:
        return self.length if self.kind == "visual" else None

    def read(self, tokenizer: ChatTokenizer, limit: int | None) -> Sequence[Question]:
        questions: Sequence[Question]
        if self.kind == "visual":
            questions = VisualNeedles(self.grid, self.length, self.pictures, self.needle)
        else:
            questions = TextNeedles(self.grid, self.length, self.sentences, self.needle, tokenizer)
        return questions if limit is None else questions[:limit]


def needle_sets(
    kind: Kind,
    lengths: Sequence[int],
    grid: Grid,
    folder: Path,
    *,
    haystack: Path | None = None,
    needles: Path | None = None,
    media_root: Path | None = None,
    task: str = "needle",
) -> list[Needles]:
    """A set for each length of a needle grid.

    Args:
        kind: `visual` or `text`.
        lengths: frames of the clips, each at least 2; or tokens of the texts.
        grid: depths and samples.
        folder: for pictures that are drawn.
        haystack: a folder of frames or a video; or a text file. None: generated.
        needles: a JSON Lines file of {"image" or "text", "question", "answer"}. None: generated numbers.
        media_root: see `read_needles`.
        task: what judges the answers.

    Raises:
        ConfigError, DataError: of haystack and needles, or a length that cannot be.
    """
    lengths = sorted(set(lengths))
    least = 2 if kind == "visual" else 1
    flag = "--frames" if kind == "visual" else "--lengths"
    if not lengths or lengths[0] < least:
        raise ConfigError(f"{flag} {' '.join(map(str, lengths))}: give the lengths of the haystacks, from {least} on.")
    needle: Callable[[int], Needle]
    if needles is not None:
        needle = given(read_needles(needles, kind, media_root=media_root), grid)
    elif kind == "visual":
        needle = numbered_page(grid, folder / "numbers")
    else:
        needle = numbered_city(grid)
    pictures = haystack_frames(haystack, folder, lengths[-1], grid.seed) if kind == "visual" else ()
    sentences = prose(haystack, grid.seed) if kind == "text" else ()
    return [
        Needles(kind=kind, length=length, grid=grid, needle=needle, pictures=pictures, sentences=sentences, task=task)
        for length in lengths
    ]
