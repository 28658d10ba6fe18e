"""The results file of an evaluation: one JSON line per answer, appended at once, so that a kill loses little."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.score import UNREADABLE
from megatron_vita.files import lock_process, no_locks, write_atomic

_HEAD = b'{"run": "'
"""How a line of results begins."""

Result = dict[str, Any]
Part = tuple[str, str, bool, int | None]
"""(model, set of questions, zero tiles, most frames of a video): what is asked and counted together."""


def part_of(result: Mapping[str, Any]) -> Part:
    """The part that a result line, or a row of a summary, belongs to."""
    return result["model"], result["data"], result["zero_tiles"], result.get("max_frames")


class ResultFile:
    """Append-only results that know which questions are answered.

    A line is {run, model, name, task, data, line, zero_tiles, max_frames, answer, extracted, expected, verdict, score,
    finished, fields}. `run` is a digest of all that decides the answer (`answer_key`): a result counts as finished only
    under the same one, so a model retrained at the same path is evaluated again, and a question whose picture was
    replaced is asked again.
    """

    def __init__(self, path: Path) -> None:
        """Open or create; a last line torn by a kill is dropped.

        Raises:
            ConfigError: it cannot be written, or another process writes it.
            DataError: another line is not a result, so it is no results file.
        """
        self.path = path
        self.results: list[Result] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_suffix(".lock").open("a", encoding="utf-8")
            if not _held(self._lock):
                self._lock.close()
                raise ConfigError(
                    f"{path}: another evaluation is writing there. Wait for its end, or give another --output."
                )
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}. Check --output.") from None
        whole = path.read_bytes()
        keep = whole.rfind(b"\n") + 1
        if keep < len(whole) and not _HEAD.startswith(whole[keep:][: len(_HEAD)]):
            raise DataError(f"{path}: its last line is no evaluation result. Give an empty folder with --output.")
        for number, line in enumerate(whole[:keep].splitlines(), 1):
            try:
                result = json.loads(line)
                self.key(result)
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}, line {number}: not an evaluation result. Give an empty folder with --output."
                ) from None
            self.results.append(result)
        if keep < len(whole):
            os.truncate(path, keep)

    @staticmethod
    def key(result: Mapping[str, Any]) -> tuple[str, str, int]:
        """Key that identifies a result: (run, data file, line)."""
        return result["run"], result["data"], result["line"]

    def limit_for(self, data: str, limit: int | None) -> int | None:
        """How many questions of a file to read, to ask the first `limit`: as far as there are results, since it must be
        known which of them still hold."""
        return None if limit is None else max(limit, *(r["line"] for r in self.results if r["data"] == data), 0)

    def forget(self, current: Mapping[Part, Mapping[int, str]]) -> tuple[int, int]:
        """Drop what no longer holds where questions are asked now, and what could not be read.

        Args:
            current: every part of this evaluation -> line -> `run`.

        Returns:
            (results of an earlier model, question or setting; unreadable ones) that were dropped.
        """
        kept, unread = [], 0
        for result in self.results:
            runs = current.get(part_of(result))
            if runs is None or (runs.get(result["line"]) == result["run"] and result["verdict"] != UNREADABLE):
                kept.append(result)
            else:
                unread += result["verdict"] == UNREADABLE
        dropped = len(self.results) - len(kept)
        if dropped:
            self._file.close()
            write_atomic(self.path, "".join(_line(result) for result in kept))
            self.results = kept
            self._file = self.path.open("a", encoding="utf-8")
        return dropped - unread, unread

    def finished(self) -> set[tuple[str, str, int]]:
        """Keys of all results in the file."""
        return {self.key(result) for result in self.results}

    def add(self, result: Result) -> None:
        """Append one result and flush it to the operating system."""
        self._file.write(_line(result))
        self._file.flush()
        self.results.append(result)

    def close(self) -> None:
        """Close the file; another evaluation may write it."""
        self._file.close()
        self._lock.close()


def _held(stream: IO[str]) -> bool:
    """Whether this process alone holds the lock file, or its file system has no locks."""
    try:
        return lock_process(stream)
    except OSError as error:
        if no_locks(error):
            return True
        raise


def _line(result: Result) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"
