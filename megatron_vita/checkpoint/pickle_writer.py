"""Pickles written without the classes that they name: the mirror image of pickles.py."""

from __future__ import annotations

import pickle
import struct
from typing import Any

from megatron_vita.checkpoint.pickles import Name, Persistent, Record


def dumps(value: Any) -> bytes:
    """The pickle, of protocol 2, that Python's own pickler would write of the objects that a value stands for.

    Names and records need not be importable here. A text or name that stands twice is written once; any other object
    that stands twice is written twice, and becomes two.

    Args:
        value: None, bool, int, float, str, tuple, list, dict (keys as values), Name, Persistent, and Record, whose call
            is made with its arguments, a tuple, and whose state is given to the result unless it is None.

    Raises:
        TypeError: of another type.
    """
    writer = _Writer()
    writer.write(value)
    return b"".join((pickle.PROTO, b"\x02", *writer.parts, pickle.STOP))


class _Writer:
    """Collects instructions. What Python's pickler would remember takes a number, so that the bytes are the same."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._numbers: dict[str | Name, int] = {}
        self._count = 0

    def write(self, value: Any) -> None:
        kind = type(value)
        if kind is str or kind is Name:
            self._once(value)
        elif kind is int:
            self.parts.append(_integer(value))
        elif kind is tuple:
            self._tuple(value)
        elif kind is Record:
            self._record(value)
        elif kind is list:
            self.parts.append(pickle.EMPTY_LIST)
            self._remember()
            self._all(value, pickle.APPENDS)
        elif kind is dict:
            self.parts.append(pickle.EMPTY_DICT)
            self._remember()
            self._all([one for item in value.items() for one in item], pickle.SETITEMS)
        elif kind is Persistent:
            self.write(value.identity)
            self.parts.append(pickle.BINPERSID)
        elif kind is float:
            self.parts.append(pickle.BINFLOAT + struct.pack(">d", value))
        elif value is None:
            self.parts.append(pickle.NONE)
        elif kind is bool:
            self.parts.append(pickle.NEWTRUE if value else pickle.NEWFALSE)
        else:
            raise TypeError(f"{kind.__name__} is not written to a pickle")

    def _once(self, value: str | Name) -> None:
        number = self._numbers.get(value)
        if number is not None:
            self.parts.append(_numbered(pickle.BINGET, pickle.LONG_BINGET, number))
            return
        if isinstance(value, Name):
            self.parts.append(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        else:
            encoded = value.encode("utf-8", "surrogatepass")
            self.parts.append(pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)
        self._numbers[value] = self._count
        self._remember()

    def _remember(self) -> None:
        self.parts.append(_numbered(pickle.BINPUT, pickle.LONG_BINPUT, self._count))
        self._count += 1

    def _all(self, items: list[Any], end: bytes) -> None:
        if items:
            self.parts.append(pickle.MARK)
            for one in items:
                self.write(one)
            self.parts.append(end)

    def _tuple(self, items: tuple[Any, ...]) -> None:
        if not items:
            self.parts.append(pickle.EMPTY_TUPLE)
            return
        if len(items) > len(_TUPLES):
            self.parts.append(pickle.MARK)
        for one in items:
            self.write(one)
        self.parts.append(_TUPLES[len(items) - 1] if len(items) <= len(_TUPLES) else pickle.TUPLE)
        self._remember()

    def _record(self, record: Record) -> None:
        self.write(record.call)
        self.write(record.arguments)
        self.parts.append(pickle.REDUCE)
        self._remember()
        if record.state is not None:
            self.write(record.state)
            self.parts.append(pickle.BUILD)


_TUPLES = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


def _numbered(short: bytes, long: bytes, number: int) -> bytes:
    return short + bytes((number,)) if number < 256 else long + struct.pack("<I", number)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + bytes((value,))
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    if len(encoded) < 256:
        return pickle.LONG1 + bytes((len(encoded),)) + encoded
    return pickle.LONG4 + struct.pack("<i", len(encoded)) + encoded
