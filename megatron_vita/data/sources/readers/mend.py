"""An array in which a record's quotes or brackets do not pair up: where the next sound record begins."""

from __future__ import annotations

import json
import re
from array import array
from typing import BinaryIO

from megatron_vita.data.sources.readers.base import MAX_RECORD, parse_record
from megatron_vita.data.sources.readers.scan import scan_array

_BETWEEN = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")
_AFTER = re.compile(r"[ \t\r\n]*[,\]]")
_BEYOND = 4 << 20
"""Bytes behind a broken record that the next sound one may reach into."""
_MOST = 1000
"""Records that are found again in one file; each time the rest of it is listed anew."""
_TURNS = ({"role", "content"}, {"from", "value"})


def array_records(stream: BinaryIO, start: int = 0, stop: int | None = None, most: int | None = None) -> array[int]:
    """As `scan_array`; but where the array does not end as it should, a broken record swallows no sound one.

    An open quote turns text into structure and structure into text, so what follows looks broken to its end. Then every
    record is parsed, and behind a broken one the next place is sought where a record like the others begins.
    """
    found, whole = scan_array(stream, start, stop, most)
    if whole or (most is not None and len(found) >= 3 * most):
        return found
    end = stream.seek(0, 2) if stop is None else stop
    keys: set[str] = set()
    out = array("q")
    at = mended = 0
    while at < len(found):
        begin, until = found[at + 1], found[at + 2]
        at += 3
        if until - begin <= MAX_RECORD:
            stream.seek(begin)
            record = parse_record(stream.read(until - begin))
            if isinstance(record, dict):
                keys = keys or set(record)
            elif not isinstance(record, list) and mended < _MOST:
                stream.seek(begin)
                again = _next_record(stream.read(min(end, until + _BEYOND) - begin), until - begin, keys)
                if again is not None:
                    mended += 1
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
