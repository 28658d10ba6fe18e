"""JSON files: records as byte ranges of a file."""

from __future__ import annotations

import io
import json
import re
from abc import abstractmethod
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.readers.base import MAX_RECORD, Reader, Record, RecordOffsets, as_offsets, parse_record
from megatron_vita.data.sources.readers.scan import BLANK, BYTE_ORDER_MARK, ArrayScanner, scan_array, scan_lines
from megatron_vita.errors import DataError

PEEK = 1 << 20
"""Bytes at the begin of a file from which its form is detected."""
_TURN = re.compile(rb'\[\s*\{\s*"(role|from)"\s*:\s*"[^"]{0,32}"\s*,\s*"(content|value)"\s*:')
"""Begin of a conversation that is not inside a record."""
_BETWEEN = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")
_AFTER = re.compile(r"[ \t\r\n]*[,\]]")
_BEYOND = 4 << 20
"""Bytes behind a broken record within which the next valid one must end."""
_MOST = 1000
"""Maximum number of repairs in one file; each lists the rest of the file again."""
_TURNS = ({"role", "content"}, {"from", "value"})


class ByteRanges(Reader):
    """Records as byte ranges: second and third number of an offset are its begin and its end."""

    @abstractmethod
    def _scan(self, stream: BinaryIO, most: int | None = None) -> array[int]:
        """Number, begin and end of every record, or of the first."""

    def index(self) -> RecordOffsets:
        with self.path.open("rb", buffering=0) as stream:
            return as_offsets(self._scan(stream))

    def read(self, offsets: RecordOffsets) -> Iterator[tuple[int, Record | DataError]]:
        with self.path.open("rb") as stream:
            for line, start, stop in offsets.tolist():
                yield line, read_range(stream, start, stop)

    def head(self, count: int) -> list[Record | DataError]:
        with self.path.open("rb", buffering=0) as stream:
            offsets = as_offsets(self._scan(stream, most=count))
        return [record for _, record in self.read(offsets)]


class JsonLines(ByteRanges):
    """One record a line; blank lines are none."""

    def _scan(self, stream: BinaryIO, most: int | None = None) -> array[int]:
        return scan_lines(stream, most=most)


class JsonArray(ByteRanges):
    """One array of records."""

    def _scan(self, stream: BinaryIO, most: int | None = None) -> array[int]:
        return array_records(stream, most=most)


def read_range(stream: BinaryIO, start: int, stop: int) -> Record | DataError:
    """The record in a range of a file."""
    if stop - start > MAX_RECORD:
        return reject("bad_record", f"{stop - start} bytes are one record; at most {MAX_RECORD} are read.")
    stream.seek(start)
    return parse_record(stream.read(stop - start))


def json_form(head: bytes) -> str:
    """`json` (an array of records) or `jsonl`, by the first bytes, since `.json` is the name of both.

    `[` may also open the first line of a JSONL file whose records are bare lists of messages.

    Args:
        head: PEEK bytes, or the whole file if it is shorter.
    """
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip(BLANK)
    if not text.startswith(b"["):
        return "jsonl"
    scanner = ArrayScanner()
    scanner.feed(text, 0)
    if b"\n" in text[: scanner.ended]:
        return "json"
    behind = b"" if scanner.ended is None else text[scanner.ended + 1 :].lstrip(BLANK)
    return "jsonl" if behind.startswith(b"[") or (not behind and is_turn(text)) else "json"


def is_turn(text: bytes) -> bool:
    """Whether the first element of an array is a turn, so that the array itself is a record."""
    offsets, _ = scan_array(io.BytesIO(text), most=1)
    first = parse_record(text[offsets[1] : offsets[2]]) if offsets else None
    if isinstance(first, dict):
        return {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()
    return _TURN.match(text) is not None


def array_records(stream: BinaryIO, start: int = 0, stop: int | None = None, most: int | None = None) -> array[int]:
    """As `scan_array`, but valid records behind a broken one are found also where the array does not end properly.

    An open quote turns text into structure and structure into text, so what follows looks broken to its end. Then every
    record is parsed, and behind a broken one the next offset at which a record like the others begins is searched for.
    """
    found, whole = scan_array(stream, start, stop, most)
    if whole or (most is not None and len(found) >= 3 * most):
        return found
    end = stream.seek(0, 2) if stop is None else stop
    keys: set[str] = set()
    out = array("q")
    at = repaired = 0
    while at < len(found):
        begin, until = found[at + 1], found[at + 2]
        at += 3
        if until - begin <= MAX_RECORD:
            stream.seek(begin)
            record = parse_record(stream.read(until - begin))
            if isinstance(record, dict):
                keys = keys or set(record)
            elif not isinstance(record, list) and repaired < _MOST:
                stream.seek(begin)
                again = _next_record(stream.read(min(end, until + _BEYOND) - begin), until - begin, keys)
                if again is not None:
                    repaired += 1
                    out.extend((len(out) // 3 + 1, begin, begin + again[0]))
                    found, at = scan_array(stream, begin + again[1], end, begun=True)[0], 0
                    continue
        out.extend((len(out) // 3 + 1, begin, until))
    return out


def _next_record(text: bytes, limit: int, keys: set[str]) -> tuple[int, int] | None:
    """(end of the broken record at the text's begin, begin of the sound one behind it)."""
    characters = text.decode("latin-1")  # a character for every byte
    decoder = json.JSONDecoder()
    for match in _BETWEEN.finditer(characters):
        if match.end() >= limit:
            return None
        try:
            record, behind = decoder.raw_decode(characters, match.end())
        except (ValueError, RecursionError):
            continue
        alike = 2 * len(record.keys() & keys) > len(keys) if keys else not any(t <= record.keys() for t in _TURNS)
        if alike and _AFTER.match(characters, behind):
            return match.start() + 1, match.end()
    return None
