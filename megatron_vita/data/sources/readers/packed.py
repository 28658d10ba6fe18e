"""JSON and JSON Lines in a packed file: unpacked once, then read like any other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from megatron_vita.data.sources.media_store import build_once, unpack
from megatron_vita.data.sources.media_store.compressed import peek
from megatron_vita.data.sources.readers.base import Reader, Record, RecordOffsets, parse_record
from megatron_vita.data.sources.readers.json_files import PEEK, JsonArray, JsonLines, array_records, json_form
from megatron_vita.data.sources.readers.scan import scan_lines
from megatron_vita.errors import DataError

_MOST = 256 << 20
"""Bytes that the first records are looked for in without unpacking all."""


class PackedJson(Reader):
    """A `.jsonl.zst`, `.json.gz` and the like."""

    def __init__(self, path: Path, kind: str, work: Path | None) -> None:
        super().__init__(path)
        self._kind, self._work = kind, work
        self._plain: Reader | None = None

    def prepare(self, *, progress: bool = True) -> None:
        self._unpacked(progress)

    def index(self) -> RecordOffsets:
        return self._inner().index()

    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        return self._inner().read(offsets)

    def head(self, count: int) -> list[Record | DataError]:
        size = PEEK
        while size <= _MOST:
            text = peek(self.path, size)
            if len(text) < size:
                break
            found = self._complete(text, count)
            if found:
                return found
            size *= 4
        return super().head(count)

    def _complete(self, text: bytes, count: int) -> list[Record | DataError]:
        """Records that are whole in the beginning of the text: at least one, at most `count`."""
        scan = array_records if self._form(text) == "json" else scan_lines
        flat = scan(io.BytesIO(text))
        whole = [(flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3) if flat[at + 2] < len(text)]
        return [parse_record(text[start:stop]) for start, stop in whole[:count]]

    def _form(self, head: bytes) -> str:
        return json_form(head[:PEEK]) if self._kind == "auto" else self._kind

    def _inner(self) -> Reader:
        if self._plain is None:
            unpacked = self._unpacked(progress=False)
            with unpacked.open("rb") as stream:
                form = self._form(stream.read(PEEK))
            self._plain = JsonArray(unpacked) if form == "json" else JsonLines(unpacked)
        return self._plain

    def _unpacked(self, progress: bool) -> Path:
        return build_once(
            self._work, "unpacked", [self.path], lambda target: unpack(self.path, target, progress=progress)
        )
