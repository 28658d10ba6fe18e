"""Questions with reference answers, from any data file that training reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_vita.data.sample import Sample, Text
from megatron_vita.data.sources.mix import read_samples
from megatron_vita.data.text.chat import without_answer
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.pictures import PictureFile

_MEDIA_KEYS = ("image", "images", "video", "videos")


@dataclass(frozen=True, slots=True)
class Question:
    """One record of an evaluation file."""

    sample: Sample
    """The conversation up to the last user turn."""
    expected: str
    """The last assistant turn: the reference answer."""
    line: int
    """Record number in the file, from 1."""
    fields: Mapping[str, Any]
    """Other scalar fields of the record (`frames`, `depth`, ...); by `category` and `duration` results are grouped."""
    answers: tuple[str, ...] = ()
    """Gold answers, where there are several; `expected` is the first."""
    options: tuple[str, ...] = ()
    """Of a multiple-choice question: the texts of the options A, B, ..."""
    task: str = ""
    """Task that judges its answer, a key of TASKS; empty: the evaluation's."""

    @property
    def golds(self) -> tuple[str, ...]:
        """Every gold answer, at least one."""
        return self.answers or (self.expected,)


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions under one name: a data file, a benchmark, a part of a sweep."""

    name: str
    """Its name in results and tables."""
    read: Callable[[int | None], Sequence[Question]]
    """The first so many questions; all for None. They may be made when they are looked at. Raises as `read_questions`
    does."""
    max_frames: int | None = None
    """Most frames that are taken of each video; None: as many as the model was trained with."""

    def sweep(self, frames: Sequence[int]) -> list[QuestionSet]:
        """The same questions with at most so many frames of each video, a set for each number.

        Raises:
            ConfigError: a number below 1; when it is read, a set without a video.
        """
        if any(most < 1 for most in frames):
            raise ConfigError(f"--frames {' '.join(map(str, frames))}: a video has at least one frame.")

        @cache
        def read(limit: int | None) -> Sequence[Question]:
            questions = self.read(limit)
            if not any(question.sample.videos for question in questions):
                raise ConfigError(f"{self.name}: no question of it shows a video. Leave out --frames.")
            return questions

        return [QuestionSet(self.name, read, most) for most in sorted(set(frames))]


def data_file(path: str, media_root: Path | None = None, work: Path | None = None) -> QuestionSet:
    """The questions of a file, see `read_questions`; its path is their name."""
    return QuestionSet(path, lambda limit: read_questions(Path(path), media_root=media_root, limit=limit, work=work))


def read_questions(
    path: Path, *, media_root: Path | None = None, limit: int | None = None, work: Path | None = None
) -> list[Question]:
    """Read a file of questions; no medium is opened yet, but each must exist.

    Args:
        path: JSON lines in Long-VITA's messages form, parquet, or any other file and form that the dataset table knows.
            A record may have `answers` (texts, if several are right) and `options` (texts, of multiple choice).
        media_root: folder of the media; by default the file's own. Nothing outside it is read.
        limit: only the first so many records.
        work: folder for pictures and videos that the records hold themselves (parquet), which every rank must see;
            None: they stay in memory.

    Raises:
        ConfigError: no such file, an unknown form, or no question in it.
        DataError: naming file and record, where one does not end with an answer or a medium is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Check --data.")
    questions = []
    with ExitStack() as stack:
        pictures: PictureFile | None = None
        for sample, record in islice(read_samples(path, media_root=media_root), limit):
            if not isinstance(sample, Sample) or sample.messages[-1].role != "assistant":
                raise DataError(f"{path}, record {sample.line}: must end with an assistant turn, the reference answer.")
            expected = "".join(part.text for part in sample.messages[-1].parts if isinstance(part, Text))
            fields, where = _plain(record), f"{path}, record {sample.line}"
            answers, options = (_texts(record, key, where) for key in ("answers", "options"))
            if work is not None and any(file.path is None for file in (*sample.images, *sample.videos)):
                pictures = pictures or stack.enter_context(PictureFile(work / f"{_name(path)}.pictures"))
                sample = pictures.keep(sample)
            questions.append(Question(without_answer(sample), expected, sample.line, fields, answers, options))
    if not questions:
        raise ConfigError(f"{path}: no questions in it. Check --data and --limit.")
    return questions


def _name(path: Path) -> str:
    """A file name for what belongs to a path: no two paths have the same."""
    return f"{path.stem}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


def _plain(record: Any) -> dict[str, Any]:
    """The values that are neither turns nor media. NaN, which no JSON has, is what tables write for a missing value."""
    if not isinstance(record, dict):
        return {}
    kinds = (str, int, float, bool, type(None))
    plain = {key: value for key, value in record.items() if key not in _MEDIA_KEYS and isinstance(value, kinds)}
    return {key: value if not isinstance(value, float) or isfinite(value) else None for key, value in plain.items()}


def _texts(record: Any, key: str, where: str) -> tuple[str, ...]:
    """A list of texts of a record; empty where there is none."""
    values = record.get(key) if isinstance(record, dict) else None
    if values is None:
        return ()
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: `{key}` must be a list of texts.")
    return tuple(values)
