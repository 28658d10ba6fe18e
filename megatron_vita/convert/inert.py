"""Files of torch.save, read without running them: tensors become places in the file, all else inert records.

A pickle is a program for a small stack machine. Two of its instructions reach outside: one names a Python object by
module and name, one calls such an object. Here a name is only a name and a call only a record of it; the few calls
that say where a tensor lies are understood, none is made. There is no import, no attribute access and no hash of a
foreign object, so nothing that a hostile file says can run, and what it says takes bounded work: see the limits below.

torch.save's format (since torch 1.6): an uncompressed zip of PREFIX/data.pkl and, for each storage, PREFIX/data/KEY
with its bytes in the order of PREFIX/byteorder. A tensor in the pickle is the call of a rebuild function on (storage,
offset, size, stride, ...), a storage the persistent id ("storage", type, KEY, device, elements).
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_vita.convert.placed import TensorPlace
from megatron_vita.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Bytes of data.pkl: those of a 72B model's ranks have less than 1 MiB."""
MAX_STEPS = 2_000_000
"""Instructions of one pickle: each makes at most one small object."""
MAX_MEMBERS = 1_000_000
"""Files in one zip."""
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSOR_CALLS = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch_npu.utils.storage", "_rebuild_npu_tensor"),
    ("torch_npu.utils._module", "_rebuild_npu_tensor"),
}
"""(storage, offset, size, stride, ...) -> tensor. Ascend's have one more argument, of the device's own."""
_PARAMETER_CALLS = {("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")}
"""(tensor, ...) -> the tensor."""
_PLAIN = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, eq=False)
class Name:
    """A Python object that the file names: only its name."""

    module: str
    name: str


@dataclass(eq=False, repr=False)  # printed, a hostile one would take for ever
class Record:
    """An object that the file would have made by a call: of what, with what, and the state given to it."""

    call: Any
    arguments: Any
    state: Any = None


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of one member of the zip."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass
class _Member:
    """Where a member's bytes lie."""

    start: int
    size: int


@dataclass
class TorchFile:
    """One file of torch.save.

    Raises (when it is opened):
        CheckpointError: no such file, or one that torch.save does not write.
    """

    path: Path
    content: Any = field(init=False)
    """What was saved: dictionaries, lists, tuples and plain values, TensorPlace for tensors, Record and Name for the
    rest."""

    def __post_init__(self) -> None:
        self._members = _read_directory(self.path)
        pickle = self._members.get("data.pkl")
        if pickle is None or pickle.size > MAX_PICKLE:
            size = "no" if pickle is None else f"{pickle.size} bytes of"
            raise CheckpointError(f"{self.path}: {size} data.pkl, not a file of torch.save. Download it again.")
        if "byteorder" in self._members and self._read(self._members["byteorder"]) != b"little":
            raise CheckpointError(f"{self.path}: was saved on a big-endian machine, which is not supported.")
        try:
            self.content = self._run(self._read(pickle))
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged program makes the machine stumble over
            raise CheckpointError(
                f"{self.path}: its data.pkl is damaged ({type(error).__name__}: {str(error)[:100]}). Download it again."
            ) from None

    def _read(self, member: _Member) -> bytes:
        with self.path.open("rb") as file:
            file.seek(member.start)
            return file.read(member.size)

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}. It is no checkpoint of Megatron's; nothing of it was run.")

    def _run(self, program: bytes) -> Any:
        """Execute the stack machine."""
        machine = _Machine(self)
        for step, (code, argument, _) in enumerate(pickletools.genops(io.BytesIO(program))):
            if step >= MAX_STEPS:
                raise self._refuse(f"its data.pkl has more than {MAX_STEPS} instructions")
            if code.name == "STOP":
                (value,) = machine.stack
                return value
            handler = getattr(machine, "op_" + code.name.lower(), None)
            if code.name in _CONSTANTS:
                machine.stack.append(_CONSTANTS[code.name])
            elif code.name in _LITERALS:
                machine.stack.append(argument)
            elif handler is not None:
                handler(argument)
            else:
                raise self._refuse(f"its data.pkl uses the instruction {code.name}, which torch.save does not write")
        raise self._refuse("its data.pkl has no end")

    def storage(self, identity: Any) -> Storage:
        """A storage from its persistent id."""
        if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
            raise self._refuse("its data.pkl refers to what is no storage")
        kind, key, elements = identity[1], identity[2], identity[4]
        dtype = _DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            name = f"{kind.module}.{kind.name}" if isinstance(kind, Name) else "no type"
            raise self._refuse(f"a storage of the kind {name}, which is not supported")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise self._refuse("a storage without name or size")
        member = self._members.get("data/" + key)
        if member is None or member.size < elements * dtype.itemsize:
            size = "is missing" if member is None else f"has {member.size} bytes"
            raise CheckpointError(f"{self.path}: storage {key[:40]} {size}. Download it again.")
        return Storage(key, dtype, elements)

    def tensor(self, arguments: tuple[Any, ...]) -> TensorPlace:
        """A tensor from the arguments of its rebuild call."""
        storage, offset, size, stride = arguments[:4]
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or any(type(one) is not int or one < 0 for one in numbers):
            raise self._refuse("a tensor whose place makes no sense")
        if len(size) != len(stride):
            raise self._refuse("a tensor whose strides do not fit its shape")
        step = 1
        for extent, distance in zip(reversed(size), reversed(stride), strict=True):
            if extent != 1 and distance != step and math.prod(size):
                raise self._refuse(f"a tensor of shape {tuple(size)[:8]} with gaps or turned around, as no weight is")
            step *= extent
        if offset + math.prod(size) > storage.elements:
            raise self._refuse(f"a tensor of shape {tuple(size)[:8]} that leaves its storage")
        start = self._members["data/" + storage.key].start + offset * storage.dtype.itemsize
        return TensorPlace(self.path, storage.dtype, tuple(size), start)


class _Machine:
    """The stack machine of pickle, for the instructions that torch.save writes; one method for each."""

    def __init__(self, file: TorchFile) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def _above_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def op_proto(self, argument: Any) -> None:
        pass

    op_frame = op_proto

    def op_mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def op_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._above_mark()

    def op_pop_mark(self, _: Any) -> None:
        self._above_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    op_binget = op_long_binget = op_get

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    op_empty_set = op_empty_list

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def op_list(self, _: Any) -> None:
        items = self._above_mark()
        self.stack.append(items)

    op_frozenset = op_list

    def op_tuple(self, _: Any) -> None:
        items = self._above_mark()
        self.stack.append(tuple(items))

    def op_dict(self, _: Any) -> None:
        items = self._above_mark()
        self.stack.append({})
        self._set(items)

    def _take(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def op_tuple1(self, _: Any) -> None:
        self._take(1)

    def op_tuple2(self, _: Any) -> None:
        self._take(2)

    def op_tuple3(self, _: Any) -> None:
        self._take(3)

    def op_append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def op_appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    op_additems = op_appends

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:  # a record's items are nobody's weights
            self.stack[-1].extend(items)

    def op_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def op_setitems(self, _: Any) -> None:
        self._set(self._above_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only plain keys are hashed: a tuple of tuples of tuples would take for ever.
            target[key if type(key) in _PLAIN else Record(None, key)] = value

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a global is named by two texts")
        self.stack.append(Name(module, name))

    def op_reduce(self, _: Any) -> None:
        arguments, call = self.stack.pop(), self.stack.pop()
        self.stack.append(self._called(call, arguments))

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self.op_reduce(None)

    def _called(self, call: Any, arguments: Any) -> Any:
        name = (call.module, call.name) if isinstance(call, Name) else None
        if name == ("collections", "OrderedDict") and arguments == ():
            return {}
        if name in _TENSOR_CALLS:
            return self.file.tensor(arguments)
        if name in _PARAMETER_CALLS and type(arguments) is tuple and isinstance(arguments[0], TensorPlace):
            return arguments[0]
        return Record(call, arguments)

    def op_build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):  # a dictionary's own attributes (state_dict's _metadata) say nothing
            self.stack[-1].state = state

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(self.file.storage(self.stack.pop()))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Instructions that push their argument."""


def _read_directory(path: Path) -> dict[str, _Member]:
    """Members of the zip by name below its one folder: each uncompressed, and inside the file."""
    try:
        total = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            if len(entries) > MAX_MEMBERS:
                raise CheckpointError(f"{path}: a zip of {len(entries)} files, not one of torch.save.")
            members = {}
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise CheckpointError(f"{path}: {entry.filename[:80]} is compressed or encrypted. Refused.")
                file.seek(entry.header_offset)
                head = struct.unpack("<4s5H3I2H", file.read(30))
                start = entry.header_offset + 30 + head[9] + head[10]
                if head[0] != b"PK\x03\x04" or start + entry.file_size > total:
                    raise CheckpointError(f"{path}: {entry.filename[:80]} leaves the file. Download it again.")
                name = entry.filename.partition("/")[2]
                if name in members:
                    raise CheckpointError(f"{path}: {name[:80]} stands in it twice. Download it again.")
                members[name] = _Member(start, entry.file_size)
            return members
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. The download is incomplete.") from None
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a zip as torch.save writes since torch 1.6 ({error}). Download it again; a file of an older "
            "torch must be saved anew in a sandbox."
        ) from None
