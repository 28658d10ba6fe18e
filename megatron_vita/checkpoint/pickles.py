"""Pickles as data: read without running them. pickle_writer.py is the mirror image.

A pickle is a program for a small stack machine. Two of its instructions reach outside: one names a Python object by
module and name, one calls such an object. Here a name is only a name and a call only a record of it. There is no
import, no attribute access and no hash of a foreign object, so nothing that a hostile file says can run, and what it
says takes bounded work: each instruction makes at most one small object, and their number has a limit.

The instructions are those of pickle's protocols 1 to 5 that torch uses: https://docs.python.org/3/library/pickletools
describes each.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError

MAX_STEPS = 2_000_000
"""Instructions of one pickle, unless its reader says otherwise."""


@dataclass(frozen=True, slots=True)
class Name:
    """A Python object that a pickle names: only its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)  # printed or compared, a hostile one would take for ever
class Record:
    """An object that a pickle makes by a call: of what, with what, and the state given to it."""

    call: Any
    arguments: Any
    state: Any = None


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Persistent:
    """An object that lies outside the pickle, by what identifies it: torch's storages."""

    identity: Any


def refused(where: Path, what: str) -> CheckpointError:
    """The error for a pickle that is not what it should be."""
    return CheckpointError(f"{where}: refused, {what}. Nothing of it was run; do not use it, or download it again.")


def run(
    program: bytes,
    where: Path,
    *,
    persistent: Callable[[Any], Any] = Persistent,
    calls: Callable[[Name, Any], Any] = lambda name, arguments: NotImplemented,
    names: Callable[[Name], None] = lambda name: None,
    max_steps: int = MAX_STEPS,
) -> Any:
    """What a pickle describes: dictionaries, lists, tuples and plain values, and records of all else.

    A dictionary's keys are plain values, Name or Record; any other is wrapped, unhashed, as Record(None, key). Sets are
    lists. collections.OrderedDict() is a dictionary; attributes of dictionaries and items of records are left out.

    Args:
        where: the file, for messages.
        persistent: what stands for an object outside, from its identity.
        calls: what stands for a call, from what is called and the arguments (anything, mostly a tuple); NotImplemented
            leaves it a Record.
        names: sees each name when the pickle says it; raises CheckpointError for one that it must not say.
        max_steps: the most instructions.

    Raises:
        CheckpointError: damaged, too long, instructions that torch does not write, or what a hook raises.
    """
    machine = _Machine(program, persistent, calls, names)
    handlers = _HANDLERS
    try:
        for _ in range(max_steps):
            code = program[machine.at]
            machine.at += 1
            handler = handlers[code]
            if handler is not None:
                handler(machine)
            elif code == pickle.STOP[0]:
                (value,) = machine.stack
                return value
            else:
                raise refused(where, f"its pickle uses the instruction 0x{code:02x}, which torch does not write")
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged program makes the machine stumble over
        raise refused(where, f"its pickle is damaged ({type(error).__name__}: {str(error)[:100]})") from None
    raise refused(where, f"its pickle has more than {max_steps} instructions")


class _Machine:
    """The stack machine: one method for each instruction, its operands are read where the program stands."""

    def __init__(
        self,
        program: bytes,
        persistent: Callable[[Any], Any],
        calls: Callable[[Name, Any], Any],
        names: Callable[[Name], None],
    ) -> None:
        self.program = program
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._persistent = persistent
        self._calls = calls
        self._names = names

    # Operands.

    def _bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.program):
            raise EOFError("it ends inside an instruction")
        content = self.program[self.at : end]
        self.at = end
        return content

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _line(self) -> str:
        line = self._bytes(self.program.index(b"\n", self.at) - self.at).decode()
        self.at += 1
        return line

    def _above_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # Plain values.

    def skip(self, size: int) -> None:
        self._bytes(size)

    def constant(self, value: Any) -> None:
        self.stack.append(value)

    def unsigned(self, size: int) -> None:
        self.stack.append(self._unsigned(size))

    def signed(self, size: int) -> None:
        self.stack.append(int.from_bytes(self._bytes(size), "little", signed=True))

    def signed_of_length(self, size: int) -> None:
        self.signed(self._unsigned(size))

    def integer_line(self) -> None:
        """Protocol 1 writes truth values as 00 and 01, and large numbers with an L at the end."""
        line = self._line()
        self.stack.append(line == "01" if line in ("00", "01") else int(line.removesuffix("L")))

    def double(self) -> None:
        self.stack.append(struct.unpack(">d", self._bytes(8))[0])

    def text(self, size: int) -> None:
        self.stack.append(self._bytes(self._unsigned(size)).decode("utf-8", "surrogatepass"))

    def binary(self, size: int) -> None:
        self.stack.append(self._bytes(self._unsigned(size)))

    # The stack and what was seen before.

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._above_mark()

    def pop_mark(self) -> None:
        self._above_mark()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def put(self, size: int) -> None:
        self.memo[self._unsigned(size)] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, size: int) -> None:
        self.stack.append(self.memo[self._unsigned(size)])

    # Containers.

    def empty_list(self) -> None:
        self.stack.append([])

    def empty_dict(self) -> None:
        self.stack.append({})

    def make_list(self) -> None:
        items = self._above_mark()
        self.stack.append(items)

    def make_tuple(self) -> None:
        items = self._above_mark()
        self.stack.append((*items,))

    def make_dict(self) -> None:
        items = self._above_mark()
        self.stack.append({})
        self._set(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        self.stack[-count:] = [(*self.stack[-count:],)]

    def append(self) -> None:
        self._extend([self.stack.pop()])

    def extend(self) -> None:
        self._extend(self._above_mark())

    def _extend(self, items: Any) -> None:
        target = self.stack[-1]
        if type(target) is list:  # a record's items are nobody's weights
            target.extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._above_mark())

    def _set(self, items: Any) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _HASHED or (type(key) is int and key.bit_length() > 64):
                key = Record(None, key)  # the hash of tuples of tuples would take for ever, those of long numbers clash
            if key in target:
                raise ValueError("a key stands twice in a dictionary")
            target[key] = value

    # What reaches outside in other readers.

    def name_lines(self) -> None:
        module, name = self._line(), self._line()
        self._name(module, name)

    def name_texts(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name is not of two texts")
        found = Name(module, name)
        self._names(found)
        self.stack.append(found)

    def call(self) -> None:
        arguments, call = self.stack.pop(), self.stack.pop()
        value = NotImplemented
        if type(call) is Name:
            value = {} if call == _ORDERED and arguments == () else self._calls(call, arguments)
        self.stack.append(Record(call, arguments) if value is NotImplemented else value)

    def call_with_keywords(self) -> None:
        self.stack.pop()  # no class that torch writes has any
        self.call()

    def build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Record:  # a dictionary's own attributes (state_dict's _metadata) say nothing
            self.stack[-1].state = state

    def outside(self) -> None:
        self.stack.append(self._persistent(self.stack.pop()))


_ORDERED = Name("collections", "OrderedDict")
_HASHED = {str, int, float, bool, bytes, type(None), Name, Record}


def _with(method: Callable[..., None], operand: Any) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, operand)


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _with(_Machine.skip, 1),
    pickle.FRAME: _with(_Machine.skip, 8),
    pickle.NONE: _with(_Machine.constant, None),
    pickle.NEWTRUE: _with(_Machine.constant, True),
    pickle.NEWFALSE: _with(_Machine.constant, False),
    pickle.BININT1: _with(_Machine.unsigned, 1),
    pickle.BININT2: _with(_Machine.unsigned, 2),
    pickle.BININT: _with(_Machine.signed, 4),
    pickle.LONG1: _with(_Machine.signed_of_length, 1),
    pickle.LONG4: _with(_Machine.signed_of_length, 4),
    pickle.INT: _Machine.integer_line,
    pickle.LONG: _Machine.integer_line,
    pickle.BINFLOAT: _Machine.double,
    pickle.SHORT_BINUNICODE: _with(_Machine.text, 1),
    pickle.BINUNICODE: _with(_Machine.text, 4),
    pickle.BINUNICODE8: _with(_Machine.text, 8),
    pickle.SHORT_BINBYTES: _with(_Machine.binary, 1),
    pickle.BINBYTES: _with(_Machine.binary, 4),
    pickle.BINBYTES8: _with(_Machine.binary, 8),
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: _Machine.pop_mark,
    pickle.DUP: _Machine.duplicate,
    pickle.BINPUT: _with(_Machine.put, 1),
    pickle.LONG_BINPUT: _with(_Machine.put, 4),
    pickle.MEMOIZE: _Machine.memoize,
    pickle.BINGET: _with(_Machine.get, 1),
    pickle.LONG_BINGET: _with(_Machine.get, 4),
    pickle.EMPTY_LIST: _Machine.empty_list,
    pickle.EMPTY_SET: _Machine.empty_list,
    pickle.EMPTY_DICT: _Machine.empty_dict,
    pickle.EMPTY_TUPLE: _with(_Machine.constant, ()),
    pickle.LIST: _Machine.make_list,
    pickle.FROZENSET: _Machine.make_list,
    pickle.TUPLE: _Machine.make_tuple,
    pickle.DICT: _Machine.make_dict,
    pickle.TUPLE1: _with(_Machine.tuple_of, 1),
    pickle.TUPLE2: _with(_Machine.tuple_of, 2),
    pickle.TUPLE3: _with(_Machine.tuple_of, 3),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.ADDITEMS: _Machine.extend,
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.GLOBAL: _Machine.name_lines,
    pickle.STACK_GLOBAL: _Machine.name_texts,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.call,
    pickle.NEWOBJ_EX: _Machine.call_with_keywords,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.outside,
}
_HANDLERS = [_INSTRUCTIONS.get(bytes([code])) for code in range(256)]
