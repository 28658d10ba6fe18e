"""The results file of an evaluation: one JSON line an answer, appended as it comes, so that a kill loses little."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vita.errors import DataError
from megatron_vita.files import write_atomic

Result = dict[str, Any]


class ResultFile:
    """Append-only results with a memory of what is finished.

    A line is {run, model, name, task, data, line, zero_tiles, answer, expected, verdict, finished, fields}. `run` is a
    digest of all that decides the answer (weights, data file, settings): a result counts as finished only under the
    same run, so a model retrained at the same path is evaluated again.
    """

    def __init__(self, path: Path) -> None:
        """Open or create; a last line torn by a kill is dropped.

        Raises:
            DataError: another line is not a result, so this is not our file.
        """
        self.path = path
        self.results: list[Result] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.is_file() else b""
        keep = whole.rfind(b"\n") + 1
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
        self._file = path.open("a", encoding="utf-8")

    @staticmethod
    def key(result: Mapping[str, Any]) -> tuple[str, str, int]:
        """What makes a result the same one again: (run, data file, line)."""
        return result["run"], result["data"], result["line"]

    def forget_stale(self, current: Iterable[tuple[str, str, bool, str]]) -> int:
        """Drop results of an earlier model, data file or setting that stood where the current ones stand.

        Args:
            current: (model, data, zero_tiles, run) of every part of this evaluation.

        Returns:
            Lines dropped.
        """
        runs = {(model, data, zero): run for model, data, zero, run in current}
        kept = [r for r in self.results if runs.get((r["model"], r["data"], r["zero_tiles"]), r["run"]) == r["run"]]
        dropped = len(self.results) - len(kept)
        if dropped:
            self._file.close()
            write_atomic(self.path, "".join(_line(result) for result in kept))
            self.results = kept
            self._file = self.path.open("a", encoding="utf-8")
        return dropped

    def finished(self) -> set[tuple[str, str, int]]:
        """Keys of all results in the file."""
        return {self.key(result) for result in self.results}

    def add(self, result: Result) -> None:
        """Append one result; it is with the operating system when this returns."""
        self._file.write(_line(result))
        self._file.flush()
        self.results.append(result)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(result: Result) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"
