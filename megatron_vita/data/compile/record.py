"""Compiles one record to an Example of a packed set, or rejects it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.example import IGNORE_INDEX, Example, MediaItem
from megatron_vita.data.media.image import read_image
from megatron_vita.data.media.video.open import VideoFile, VideoLimits, open_video
from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Document, Sample, Text
from megatron_vita.data.sources.media_store.store import open_store
from megatron_vita.data.sources.mix import MixFile
from megatron_vita.data.sources.to_sample import Changes, clean_answers, record_to_sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.chat import build_document, build_example, shift_labels
from megatron_vita.data.text.frame_budget import frames_that_fit
from megatron_vita.data.text.long_text import beginnings
from megatron_vita.data.text.spell_out import spell_out
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError

OVERLONG = ("reject", "truncate", "reduce-frames")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Settings of compiling records."""

    spec: PreprocessSpec
    seq_length: int
    overlong: str = "reduce-frames"
    """`reject`; `truncate`: shorten the longest question, then the end; `reduce-frames`: take fewer frames."""
    verify_media: str = "structure"
    video_limits: VideoLimits = VideoLimits()
    video_backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled record."""

    example: Example
    shortened: bool
    """Text or frames were dropped to fit the sequence."""
    changes: Changes
    """What the conversion to a Sample dropped."""


class Compiler:
    """Compiles records of a mix to Examples, by the functions that chat and the server use, too."""

    def __init__(self, tokenizer: VitaTokenizer, rules: Rules, work: Path | None = None) -> None:
        """`work`: cache folder of unpacked copies and indexes (`open_store`)."""
        self._tokenizer, self._rules, self._spec, self._work = tokenizer, rules, rules.spec, work

    def compile(self, record: Any, file: MixFile, line: int) -> Compiled:
        """Convert a record, read its media, tokenise it, and fit it to the sequence.

        Raises:
            DataError: beginning with an error code.
        """
        if isinstance(record, DataError):
            raise record
        store = open_store(file.media, self._work)
        sample, changes = record_to_sample(record, file.row, store=store, source=file.name, line=line)
        if isinstance(sample, Sample):
            sample = spell_out(sample, self._tokenizer)
        sample = beginnings(sample, self._rules.seq_length, self._tokenizer)
        if isinstance(sample, Document):
            example = build_document(sample, tokenizer=self._tokenizer)
            cut = len(example.tokens) > self._rules.seq_length
            return Compiled(self._cut(example) if cut else example, cut, changes)
        return self._sample(sample, changes)

    def _sample(self, sample: Sample, changes: Changes) -> Compiled:
        if self._tokenizer.joins_blanks:
            sample, cleaned = clean_answers(sample, blanks=True)
            changes = dataclasses.replace(changes, cleaned=changes.cleaned + cleaned)
        if sample.messages[-1].role != "assistant":
            raise reject("no_answer", "the conversation ends with a question.")
        if not any(message.learnt for message in sample.messages if message.role == "assistant"):
            raise reject("no_answer", "every answer is marked not to be learnt.")
        images = [read_image(file, verify=self._rules.verify_media) for file in sample.images]
        videos, reduced = self._videos(sample, images)
        example = build_example(sample, images, videos, tokenizer=self._tokenizer, spec=self._spec)
        shortened = reduced
        if len(example.tokens) > self._rules.seq_length:
            example = self._shorten(sample, images, videos, example)
            shortened = True
        return Compiled(example, shortened, changes)

    def _videos(self, sample: Sample, images: Sequence[MediaItem]) -> tuple[list[list[MediaItem]], bool]:
        """Decode the frames of every video that fit; their number is computed before."""
        spec, rules = self._spec, self._rules
        opened: list[VideoFile] = []
        try:
            for file in sample.videos:
                opened.append(open_video(file, rules.video_backend, limits=rules.video_limits))
            if not opened:
                return [], False
            fit, most = frames_that_fit(
                sample, images, opened, tokenizer=self._tokenizer, spec=spec, seq_length=rules.seq_length
            )
            if fit < most and (fit < 1 or rules.overlong == "reject"):
                raise reject("overlong", f"{_too_long(rules)} with {most} frames.")
            limit = most if rules.overlong == "truncate" else fit
            return [video.frames(spec, limit) for video in opened], limit < most
        finally:
            for video in opened:
                video.close()

    def _shorten(
        self, sample: Sample, images: list[MediaItem], videos: list[list[MediaItem]], example: Example
    ) -> Example:
        """Cut the longest question so that the answers stay; if that is not enough, cut the end."""
        rules = self._rules
        if rules.overlong != "truncate":
            raise reject("overlong", f"{len(example.tokens)} tokens or more. {_too_long(rules)}.")
        place = _longest_question(sample)
        excess = len(example.tokens) - rules.seq_length
        if place is not None:
            turn, part = place
            text = sample.messages[turn].parts[part]
            assert isinstance(text, Text)
            length = len(self._tokenizer.encode(text.text))
            for spare in range(0, 64, 8):  # cut text may need a token more at its new end
                keep = length - excess - spare
                if keep < 1:
                    break
                shorter = _with_text(sample, turn, part, self._tokenizer.cut(text.text, keep))
                built = build_example(shorter, images, videos, tokenizer=self._tokenizer, spec=self._spec)
                if len(built.tokens) <= rules.seq_length:
                    return built
        return self._cut(example)

    def _cut(self, example: Example) -> Example:
        """The first seq_length tokens, if no tile is lost and something is left to learn."""
        rules = self._rules
        size = rules.seq_length
        if rules.overlong != "truncate":
            raise reject("overlong", f"{len(example.tokens)} tokens or more. {_too_long(rules)}.")
        if any(slot.first_token + self._spec.tokens_per_tile > size for slot in example.tiles):
            raise reject("overlong", f"its pictures alone are more than {size} tokens.")
        tokens = example.tokens[:size]
        labelled = np.concatenate([[False], example.labels[: size - 1] != IGNORE_INDEX])
        labels = shift_labels(tokens, labelled)
        if not (labels != IGNORE_INDEX).any():
            raise reject("overlong", f"nothing to learn is left in the first {size} tokens.")
        return dataclasses.replace(example, tokens=tokens, labels=labels)


def _too_long(rules: Rules) -> str:
    return (
        f"It does not fit into --seq-length {rules.seq_length} under --overlong {rules.overlong}; raise the one or "
        "change the other"
    )


def _longest_question(sample: Sample) -> tuple[int, int] | None:
    """(turn, part) of the longest text that is not an answer."""
    texts = [
        (len(part.text), -turn, -number)
        for turn, message in enumerate(sample.messages)
        for number, part in enumerate(message.parts)
        if isinstance(part, Text) and message.role != "assistant"
    ]
    if not texts:
        return None
    _, turn, number = max(texts)
    return -turn, -number


def _with_text(sample: Sample, turn: int, part: int, text: str) -> Sample:
    message = sample.messages[turn]
    parts = (*message.parts[:part], Text(text), *message.parts[part + 1 :])
    messages = (*sample.messages[:turn], dataclasses.replace(message, parts=parts), *sample.messages[turn + 1 :])
    return dataclasses.replace(sample, messages=messages)
