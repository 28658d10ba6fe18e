"""The output of a batch: one line a request in the form of OpenAI's batch API, appended as it comes."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import lock

_PREFIX = "batch_req_"
_HEAD = b'{"id": "' + _PREFIX.encode()
"""How a line of answers begins."""


class AnswerFile:
    """Append-only answers that know which requests are answered; a context manager that holds the file alone.

    A line is {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}. `id` is `batch_req_` and
    a digest of all that decides the answer.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self.path = path
        self.answers: dict[str, str] = {}
        """custom_id -> digest of every request that was answered; failures are not among them."""
        self._lines = 0
        self._held = ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> AnswerFile:
        """Create or go on with the file; a last line that was torn by a kill is cut off.

        Raises:
            ConfigError: another run holds it, or it cannot be written.
            DataError: it holds something else than answers.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            path = self.path.with_name(self.path.name + ".lock")
            if not lock(self._held.enter_context(path.open("ab"))):
                raise ConfigError(f"{self.path}: another run is writing it. Wait for it, or give another --output.")
            self._held.callback(path.unlink, missing_ok=True)
            if self.path.exists():
                self._read()
            self._file = self._held.enter_context(self.path.open("ab", buffering=0))
        except OSError as error:
            self._held.close()
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}. Check --output.") from None
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def keep(self, names: Container[str]) -> int:
        """Drop the answers of other requests than these, and the lines of all that failed.

        Returns:
            How many answers were dropped.
        """
        kept = {custom_id: key for custom_id, key in self.answers.items() if custom_id in names}
        dropped = len(self.answers) - len(kept)
        if len(kept) < self._lines:
            partial = self.path.with_name(self.path.name + ".partial")
            with self.path.open("rb") as old, partial.open("wb") as new:
                new.writelines(raw for raw in old if _answered(json.loads(raw))[0] in kept)
            os.replace(partial, self.path)
            self._file = self._held.enter_context(self.path.open("ab", buffering=0))
        self.answers, self._lines = kept, len(kept)
        return dropped

    def add(self, custom_id: str | None, key: str | None, body: dict[str, Any], error: dict[str, Any] | None) -> None:
        """Append one line by one write.

        Args:
            custom_id: names the request; None where it has no name of its own.
            key: digest of all that decides the answer; None for a failure before it is known.
            body: of the response.
            error: OpenAI's error object; None for an answer.

        Raises:
            DataError: it cannot be written.
        """
        record = {
            "id": _PREFIX + (key or uuid.uuid4().hex[:16]),
            "custom_id": custom_id,
            "response": {"status_code": 400 if error else 200, "request_id": uuid.uuid4().hex, "body": body},
            "error": error,
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        try:
            whole = self._file.write(line) == len(line)
        except OSError as problem:
            raise DataError(f"{self.path}: cannot be written: {problem.strerror}. Run again to continue.") from None
        if not whole:
            raise DataError(f"{self.path}: the disk is full. Make room, and run again to continue.")

    def _read(self) -> None:
        place = 0
        with self.path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if not raw.endswith(b"\n") and _HEAD.startswith(raw[: len(_HEAD)]):
                    os.truncate(self.path, place)  # torn by a kill
                    break
                place += len(raw)
                self._lines += 1
                try:
                    custom_id, key = _answered(json.loads(raw))
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise DataError(
                        f"{self.path}, line {number}: not a line of answers. Give another file with --output."
                    ) from None
                if custom_id is not None:
                    self.answers[custom_id] = key


def _answered(record: Any) -> tuple[str | None, str]:
    """(custom_id of an answered request or None, its digest) of a line."""
    key, custom_id, status = record["id"], record["custom_id"], record["response"]["status_code"]
    if not isinstance(key, str) or not isinstance(custom_id, (str, type(None))):
        raise TypeError
    return (custom_id if status == 200 and record["error"] is None else None), key.removeprefix(_PREFIX)
