"""Digests of questions: an answer on disk is reused only while its question is unchanged."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from megatron_vita.data.sample import MediaFile
from megatron_vita.errors import ConfigError
from megatron_vita.evaluation.questions import Question
from megatron_vita.inference.answer_key import MediaKeys, digest_of_parts

Stamp = tuple[int, int, int, int]


class QuestionKeys:
    """Digests of questions: turns, task, gold answers, options, carried fields, and the bytes of their media."""

    def __init__(self, kept: Path | None = None) -> None:
        """`kept`: file for the digests of media, so that the next run does not read a benchmark's videos again."""
        self._media = MediaKeys() if kept is None else KeptMediaKeys(kept)

    def key(self, question: Question) -> str:
        """Digest of a question. A medium that cannot be read has a digest, too; reading it raises the error."""
        sample = question.sample
        media = [[self._media.key(one) for one in part] for part in (sample.images, sample.videos)]
        bare = dataclasses.replace(sample, images=(), videos=(), source="", line=0)
        gold = [question.expected, question.answers, question.options, question.task]
        return digest_of_parts(repr(bare), media, gold, dict(question.fields))


class KeptMediaKeys(MediaKeys):
    """Digests of media that are kept in a file.

    One counts while the medium's file is the same: its size, inode and both times, one of which no program can set.
    """

    def __init__(self, path: Path) -> None:
        """Read what is kept; a line torn by a kill is ignored.

        Raises:
            ConfigError: the file cannot be written.
        """
        super().__init__()
        self._kept: dict[str, tuple[Stamp, str]] = {}
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read or written: {error.strerror}. Check --output.") from None
        for line in lines:
            try:
                name, size, inode, written, changed, digest = json.loads(line)
                self._kept[name] = ((size, inode, written, changed), digest)
            except (ValueError, TypeError):
                continue

    def _read(self, file: MediaFile) -> str:
        stamp = _stamp(file)
        if stamp is None:
            return super()._read(file)
        assert file.path is not None
        kept = self._kept.get(file.path)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        digest = super()._read(file)
        if _stamp(file) == stamp:  # nobody wrote while it was read
            try:
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([file.path, *stamp, digest]) + "\n")
            except OSError as error:
                raise ConfigError(f"{self._path}: cannot be written: {error.strerror}. Check --output.") from None
        return digest


def _stamp(file: MediaFile) -> Stamp | None:
    """What tells whether a file is another one; None for what is no whole file."""
    if file.path is None or file.size is not None or not os.path.isfile(file.path):
        return None
    status = os.stat(file.path)
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
