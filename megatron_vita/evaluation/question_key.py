"""Digests of questions: an answer on disk is reused only while its question is unchanged."""

from __future__ import annotations

import dataclasses

from megatron_vita.evaluation.questions import Question
from megatron_vita.inference.answer_key import MediaKeys, digest_of_parts


class QuestionKeys:
    """Digests of questions: turns, task, gold answers, options, carried fields, and the bytes of their media."""

    def __init__(self) -> None:
        self._media = MediaKeys()

    def key(self, question: Question) -> str:
        """Digest of a question. A medium that cannot be read has a digest, too; reading it raises the error."""
        sample = question.sample
        media = [[self._media.key(one) for one in part] for part in (sample.images, sample.videos)]
        bare = dataclasses.replace(sample, images=(), videos=(), source="", line=0)
        gold = [question.expected, question.answers, question.options, question.task]
        return digest_of_parts(repr(bare), media, gold, dict(question.fields))
