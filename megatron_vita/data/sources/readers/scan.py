"""Finds the byte offsets of records in JSON text, block by block, without parsing, in constant memory.

Only quotes, backslashes, brackets and commas are looked at, all of a block at once, so a broken record hurts no other
as long as its quotes and brackets pair up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

BLANK = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_BLOCK = 256 << 10
"""Bytes scanned at once; a block fits into the cache of a processor core."""
_QUOTE, _BACKSLASH, _COMMA, _OPEN, _CLOSE, _NEWLINE = b'"\\,{}\n'

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


class ArrayScanner:
    """Incremental scanner of one JSON array: finds the offsets of its records."""

    def __init__(self, begun: int | None = None) -> None:
        """An array that is to begin, or one whose records begin at the offset `begun`."""
        self._depth = int(begun is not None)
        """Open brackets; 0 before the array and behind it."""
        self._in_string = False
        self._escaped = False
        """The next block's first byte stands behind a backslash."""
        self.began = begun
        """Offset of the array's first record, once its bracket has been seen."""
        self.ended: int | None = None
        """Offset of the bracket that ends the array, once it has been seen."""

    def feed(self, block: bytes | memoryview, offset: int) -> Offsets:
        """Offsets of the commas between records in the next block.

        Args:
            block: bytes; a whole number of blocks makes the file.
            offset: where the block lies in the file.
        """
        nothing = np.zeros(0, dtype=np.int64)
        begin = 0
        if self.began is None:
            begin = bytes(block).find(b"[") + 1
            if not begin:
                return nothing
            self.began, self._depth = offset + begin, 1
        if self.ended is not None:
            return nothing
        text = np.frombuffer(block, dtype=np.uint8)[begin:]
        marks = np.flatnonzero(_marked(text))
        kinds = text[marks]
        quotes = kinds == _QUOTE
        self._drop_escaped(text, marks, kinds, quotes)
        # an even number of quotes before a mark: it stands outside of strings
        parity = np.cumsum(quotes, dtype=np.uint8)  # its lowest bit is right, however many there are
        parity &= 1
        inside = parity ^ np.uint8(self._in_string)
        self._in_string = bool(inside[-1]) if len(inside) else self._in_string
        inside |= quotes
        outside = np.flatnonzero(inside == 0)
        marks, kinds = marks[outside], kinds[outside]
        folded = kinds | 0x20  # [ and { alike, ] and } alike
        depth = self._depth + np.cumsum((folded == _OPEN).astype(np.int32) - (folded == _CLOSE), dtype=np.int32)
        between = (kinds == _COMMA) & (depth == 1)
        ends = np.flatnonzero(depth <= 0)
        if len(ends):
            self.ended = offset + begin + int(marks[ends[0]])
            between[ends[0] :] = False
        if len(depth):
            self._depth = int(depth[-1])
        return marks[between].astype(np.int64) + (offset + begin)

    def _drop_escaped(self, text: Bytes, marks: Offsets, kinds: Bytes, quotes: npt.NDArray[np.bool_]) -> None:
        """Take out of `quotes` those behind a backslash that is not itself behind one."""
        slashes = np.flatnonzero(kinds == _BACKSLASH)
        if self._escaped and len(marks) and marks[0] == 0:
            quotes[0] = False
            if len(slashes) and slashes[0] == 0:
                slashes = slashes[1:]
        self._escaped = False
        if not len(slashes):
            return
        at = marks[slashes]
        first = np.ones(len(at), dtype=bool)
        first[1:] = np.diff(at) != 1
        run = np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
        active = slashes[(np.arange(len(at)) - run) % 2 == 0]
        self._escaped = bool(marks[active[-1]] == len(text) - 1)
        following = active[active + 1 < len(marks)]
        following = following[marks[following + 1] == marks[following] + 1] + 1
        quotes[following] = False


def scan_array(
    stream: BinaryIO, start: int = 0, stop: int | None = None, most: int | None = None, *, begun: bool = False
) -> tuple[array[int], bool]:
    """Records of the JSON array in a stream: (number from 1, offset, end) one after another.

    What stands behind the array is one more record, so that it is not lost; so is the rest of an array that never ends.

    Args:
        stream: where to read.
        start: where the text begins.
        stop: where it ends; none: with the stream.
        most: enough records.
        begun: the array's bracket stands before `start`.

    Returns:
        (the records, whether the array ends and nothing stands behind it).
    """
    scanner, found, end = ArrayScanner(begun=start if begun else None), array("q"), start
    first: int | None = None
    count = 0
    for block, offset in _blocks(stream, start, stop):
        end = offset + len(block)
        commas = scanner.feed(block, offset)
        if first is None:
            first = scanner.began
        if len(commas):
            assert first is not None
            rows = np.empty((len(commas), 3), dtype=np.int64)
            rows[:, 0] = np.arange(count + 1, count + 1 + len(commas))
            rows[0, 1], rows[1:, 1], rows[:, 2] = first, commas[:-1] + 1, commas
            found.frombytes(rows.tobytes())
            count, first = count + len(commas), int(commas[-1]) + 1
        if scanner.ended is not None or (most is not None and count >= most):
            break
    if most is not None and count >= most:
        return found[: 3 * most], True
    if first is None:  # no array at all: what is there is one record, and a broken one
        pieces = [(start, _end(stream, stop))]
    elif scanner.ended is None:
        pieces = [(first, end)]
    else:
        pieces = [(first, scanner.ended), (scanner.ended + 1, _end(stream, stop))]
    whole = scanner.ended is not None
    for begin, until in pieces:
        if not _is_blank(stream, begin, until):
            count += 1
            found.extend((count, begin, until))
            whole = whole and begin == first
    return found, whole


def scan_lines(stream: BinaryIO, start: int = 0, stop: int | None = None, most: int | None = None) -> array[int]:
    """Lines of a stream that are not blank: (line number from 1, offset, end behind the line break), one after another.

    Args: as `scan_array`.
    """
    found = array("q")
    line, begin, filled = 1, start, False  # of the line that the block before did not finish
    if _peek(stream, start, stop, 3) == BYTE_ORDER_MARK:
        begin = start = start + 3
    end = start
    for block, offset in _blocks(stream, start, stop):
        end = offset + len(block)
        text = np.frombuffer(block, dtype=np.uint8)
        breaks = np.flatnonzero(text == _NEWLINE)
        if not len(breaks):
            filled = filled or bool(block.strip(BLANK))
            continue
        begins = np.concatenate([[0], breaks[:-1] + 1])
        full = text[begins] > 0x20
        full[0] = full[0] or filled
        for one in np.flatnonzero(~full).tolist():  # empty, or begins with a blank
            full[one] = bool(block[begins[one] : breaks[one]].strip(BLANK))
        rows = np.empty((len(breaks), 3), dtype=np.int64)
        rows[:, 0] = np.arange(line, line + len(breaks))
        rows[:, 1], rows[:, 2] = begins + offset, breaks + (offset + 1)
        rows[0, 1] = begin
        found.frombytes(rows[full].tobytes())
        line, begin = line + len(breaks), offset + int(breaks[-1]) + 1
        filled = bool(block[int(breaks[-1]) + 1 :].strip(BLANK))
        if most is not None and len(found) >= 3 * most:
            return found[: 3 * most]
    if filled:
        found.extend((line, begin, end))
    return found


def _marked(text: Bytes) -> npt.NDArray[np.bool_]:
    """Mask of quotes, commas, brackets and backslashes (and of `|`, which callers ignore)."""
    folded = text | 0x20
    folded -= 0x7B  # { and [ become 0, | and \ 1, } and ] 2, all others more
    marked = folded <= 2
    marked |= text == _QUOTE
    marked |= text == _COMMA
    return marked


def _blocks(stream: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    stream.seek(start)
    offset = start
    while stop is None or offset < stop:
        block = stream.read(_BLOCK if stop is None else min(_BLOCK, stop - offset))
        if not block:
            return
        yield block, offset
        offset += len(block)


def _end(stream: BinaryIO, stop: int | None) -> int:
    return stream.seek(0, 2) if stop is None else stop


def _peek(stream: BinaryIO, start: int, stop: int | None, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size if stop is None else min(size, stop - start))


def _is_blank(stream: BinaryIO, start: int, stop: int) -> bool:
    stream.seek(start)
    left = stop - start
    while left > 0:
        block = stream.read(min(left, _BLOCK))
        if not block:
            break
        if block.removeprefix(BYTE_ORDER_MARK).strip(BLANK):
            return False
        left -= len(block)
    return True
