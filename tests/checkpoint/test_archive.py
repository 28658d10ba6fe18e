"""torch.save's files: what we write is torch's to the byte, what torch writes is found, and hostile files stay inert.

Nothing in a hostile file runs, what it asks for takes bounded work, and each ends in one clear line or a record.

That nothing runs is watched twice: by the traces that the programs would leave, and by Python's audit hook, which
reports every import, process and compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint import archive, pickles, zips
from megatron_vita.checkpoint.archive import TorchFile
from megatron_vita.checkpoint.dtypes import DTYPES, DType, bits_of, by_name, torch_dtype
from megatron_vita.checkpoint.pickles import Name, Record
from megatron_vita.checkpoint.placed import TensorPlace
from megatron_vita.errors import CheckpointError

EVENTS: list[str] = []
_WATCHED = ("os.", "subprocess.", "socket.", "ctypes.", "import", "exec", "compile", "pickle.find_class", "shutil.")


def _watch(event: str, arguments: Any) -> None:
    if _watching and event.startswith(_WATCHED):
        EVENTS.append(f"{event} {str(arguments)[:80]}")


_watching = False
sys.addaudithook(_watch)


def write(path: Path, program: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A file as torch.save lays it out, around any program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for name, content in (members or {}).items():
            archive.writestr("archive/" + name, content)
    return path


def read(path: Path) -> Any:
    """What is in a file; fails if reading it does anything that Python audits."""
    global _watching
    EVENTS.clear()
    _watching = True
    try:
        return TorchFile(path).content
    finally:
        _watching = False
        assert EVENTS == []


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What zipfile and pickletools import on first use."""
    TorchFile(write(tmp_path_factory.mktemp("first") / "x.pt", pickle.dumps({"a": "b"}, protocol=2)))


def place(tensor: TensorPlace) -> torch.Tensor:
    """A tensor's elements, read by its place."""
    content = bytearray(tensor.file.read_bytes()[tensor.start :])
    count, dtype = torch.Size(tensor.shape).numel(), torch_dtype(tensor.dtype)
    return torch.frombuffer(content, dtype=dtype, count=count).reshape(tensor.shape) if count else torch.empty(0)


def test_what_torch_saves_is_found(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "plain": torch.randn(3, 5),
        "view": base[4:16].view(3, 4),
        "same storage": base[:6],
        "bf16": torch.randn(2, 2).bfloat16(),
        "ints": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "row": torch.randn(6, 4)[2:3],
    }
    other = {"args": argparse.Namespace(a=1, kind=torch.float16), "list": [1, (2.5, None)], "ordered": OrderedDict(k=1)}
    torch.save({"model": tensors, **other}, tmp_path / "x.pt")
    content = read(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        assert torch_dtype(content["model"][name].dtype) == tensor.dtype
        assert torch.equal(place(content["model"][name]), tensor.detach()), name
    assert content["list"] == [1, (2.5, None)]
    assert content["ordered"] == {"k": 1}
    assert content["args"].state["a"] == 1
    assert isinstance(content["args"].call, Name)
    assert isinstance(content["args"].state["kind"], Name)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def _programs(trace: Path) -> dict[str, bytes]:
    import builtins
    import os
    import subprocess

    command = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w')"
    nested = Call(getattr, Call(__import__, "os"), "system")
    raw = {
        "os.system": Call(os.system, command),
        "posix by its own name": pickle.PROTO + b"\x02cposix\nsystem\n(X" + struct.pack("<I", len(command))
        + command.encode() + b"tR.",
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "popen": Call(subprocess.Popen, ["touch", str(trace)]),
        "nested": Call(map, nested, [command]),
        "getattr of a tensor": Call(getattr, torch.nn.Module, "forward"),
        "torch.load": Call(torch.load, str(trace)),
        "namespace whose state calls": argparse.Namespace(x=Call(os.system, command)),
        "key that calls": {Call(os.system, command): 1},
        "instance": b"(ios\nsystem\n.",
        "extension": pickle.PROTO + b"\x02\x82\x01.",
        "setattr by state": pickle.PROTO + b"\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x08\x00\x00\x00"
        b"__code__K\x01stb.",
        "builder replaced": pickle.PROTO + b"\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00"
        b"__setstate__cos\nsystem\nsb.",
    }  # fmt: skip
    return {name: one if isinstance(one, bytes) else pickle.dumps(one, protocol=2) for name, one in raw.items()}


@pytest.mark.parametrize("name", _programs(Path("x")))
def test_nothing_runs(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    file = write(tmp_path / "x.pt", _programs(trace)[name])
    before = {module: dict(vars(module)) for module in (archive, pickles, torch._utils)}
    if name in ("instance", "extension"):
        with pytest.raises(CheckpointError, match="uses the instruction"):
            read(file)
    else:
        assert isinstance(read(file), Record | Name | dict)
    assert not trace.exists()
    for module, was in before.items():
        assert {key: value for key, value in vars(module).items() if was.get(key) is not value} == {}


def _storage(elements: int, kind: bytes = b"FloatStorage") -> bytes:
    return b"((X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuI%d\ntQ" % elements


def _tensor(elements: int, offset: int, size: bytes, stride: bytes, kind: bytes = b"FloatStorage") -> bytes:
    """A program that rebuilds one tensor. The opening mark is that of the arguments."""
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    return head + _storage(elements, kind) + b"I%d\n" % offset + size + stride + b"\x89NtR."


BAD: dict[str, tuple[bytes, str]] = {
    "sound": (_tensor(4, 0, b"(K\x02K\x02t", b"(K\x02K\x01t"), ""),
    "beyond its storage": (_tensor(4, 1, b"(K\x02K\x02t", b"(K\x02K\x01t"), "leaves its storage"),
    "storage beyond the file": (_tensor(5, 0, b"(K\x05t", b"(K\x01t"), "storage 0 has 16 bytes"),
    "huge": (_tensor(4, 0, b"(I%d\nI%d\nt" % (1 << 62, 1 << 62), b"(I%d\nK\x01t" % (1 << 62)), "leaves its storage"),
    "huge with no stride": (_tensor(4, 0, b"(I%d\nt" % (1 << 62), b"(K\x00t"), "with gaps"),
    "negative size": (_tensor(4, 0, b"(I-2\nt", b"(K\x01t"), "makes no sense"),
    "negative offset": (_tensor(4, -1, b"(K\x02t", b"(K\x01t"), "makes no sense"),
    "negative storage": (_tensor(-4, 0, b"(K\x02t", b"(K\x01t"), "without name or size"),
    "turned around": (_tensor(4, 0, b"(K\x02K\x02t", b"(K\x01K\x02t"), "gaps or turned around"),
    "strides of another shape": (_tensor(4, 0, b"(K\x02K\x02t", b"(K\x01t"), "strides do not fit"),
    "quantised": (_tensor(4, 0, b"(K\x02t", b"(K\x01t", b"QInt8Storage"), "kind torch.QInt8Storage"),
    "size that is no list": (_tensor(4, 0, b"N", b"(K\x01t"), "damaged"),
    "no storage": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR.", "makes no sense"),
    "persistent id": (b"\x80\x02X\x03\x00\x00\x00abcQ.", "refers to what is no storage"),
    "nothing on the stack": (b"\x80\x02R.", "damaged"),
    "no end": (b"\x80\x02N", "damaged|no end"),
    "memo that is not there": (b"\x80\x02h\x07.", "damaged"),
    "memo at the other end": (b"\x80\x02Nr\xff\xff\xff\xff.", ""),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
    "number longer than the file": (b"\x80\x02\x8b\xff\xff\xff\x7fa.", "damaged"),
    "endless digits": (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "damaged"),
    "laughs": (b"\x80\x02)" + b"2\x86" * 200 + b"}" + b"N" * 0 + b".", "damaged"),
    "key of laughs": (b"\x80\x02})" + b"2\x86" * 200 + b"Ns.", ""),
    "open tuples": (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", ""),
    "not a pickle": (b"hello", "damaged|instruction"),
    "many dimensions": (_tensor(4, 0, b"(" + b"K\x01" * 65 + b"t", b"(" + b"K\x01" * 65 + b"t"), "strides do not fit"),
    "long numbers": (_tensor(4, 0, b"(\x8a\xff" + b"\x7f" * 255 + b"t", b"(K\x01t"), "makes no sense"),
    "key twice": (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "damaged"),
    "many instructions": (b"\x80\x02" + b"N0" * (pickles.MAX_STEPS // 2) + b"N.", "more than 2000000 instructions"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_at_once(name: str, tmp_path: Path) -> None:
    program, message = BAD[name]
    file = write(tmp_path / "x.pt", program, {"data/0": bytes(16)})
    if message:
        with pytest.raises(CheckpointError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert len(str(caught.value)) < 500
    else:
        read(file)


def test_zips_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    sound = pickle.dumps({}, protocol=2)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(path)

    refused("no such file")
    path.write_bytes(b"\x80\x02}.")  # a bare pickle, as torch wrote before 1.6
    refused("not a zip as torch.save writes")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))  # a bomb
    refused("compressed or encrypted")
    write(path, sound)
    path.write_bytes(path.read_bytes()[:-30])
    refused("not a zip as torch.save writes")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", b"")
    refused("no data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", sound)
        archive.writestr("other/data.pkl", sound)
    refused("stands in it twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", sound)
        archive.writestr("archive/byteorder", "big")
    refused("big-endian")


def test_a_list_of_members_without_end_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2000):
            archive.writestr(f"archive/data/{number}", b"")
    monkeypatch.setattr(zips, "MAX_DIRECTORY", 100_000)  # more than zipfile reads to find the list
    with pytest.raises(CheckpointError, match="its list of members has more than 100000 bytes"):
        read(path)


@settings(max_examples=150, deadline=None)
@given(program=st.binary(max_size=300), spoil=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_any_bytes_give_a_value_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, program: bytes, spoil: list[tuple[int, int]]
) -> None:
    """Random programs, and a sound one with some bytes changed."""
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    sound = bytearray(BAD["sound"][0] + pickle.dumps({"args": argparse.Namespace(a=[1, 2])}, protocol=2))
    for at, value in spoil:
        sound[at % len(sound)] = value
    for one in (program, bytes(sound)):
        with contextlib.suppress(CheckpointError):
            read(write(path, one, {"data/0": bytes(16)}))


def _stock(value: Any) -> bytes:
    """What torch.save writes, with no CRC-32 of elements."""
    stream = io.BytesIO()
    with torch.serialization.skip_data():
        torch.save(value, stream)
    return stream.getvalue()


_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 255, 256, 65536]), max_size=6).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    shape=_SHAPES.filter(lambda shape: math.prod(one or 1 for one in shape) < 1 << 20), dtype=st.sampled_from(DTYPES)
)
@example(shape=(), dtype=DTYPES[0])
@example(shape=(0, 3), dtype=DTYPES[0])
def test_a_frame_is_what_torch_writes(shape: tuple[int, ...], dtype: DType) -> None:
    tensor = torch.zeros(shape, dtype=torch_dtype(dtype))
    head, tail = archive.frame(shape, dtype)
    assert len(head) % 64 == 0
    assert head + bytes(tensor.nbytes) + tail == _stock(tensor)


@pytest.mark.parametrize("elements", [(1 << 32) - 2, (1 << 32) - 1, (1 << 32) + 7])
def test_a_frame_of_more_than_4_gib_is_what_torch_writes(elements: int, tmp_path: Path) -> None:
    uint8 = by_name("uint8")
    assert uint8 is not None
    path = tmp_path / "archive"  # its name is in the bytes; a stream's is the same
    with torch.serialization.skip_data():  # which leaves a hole in the file
        torch.save(torch.empty(elements, dtype=torch.uint8), path)
    head, tail = archive.frame((elements,), uint8)
    with path.open("rb") as file:
        assert file.read(len(head)) == head
        file.seek(elements, os.SEEK_CUR)
        assert file.read() == tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_what_is_framed(dtype: DType, tmp_path: Path) -> None:
    tensor = torch.randint(0, 2, (3, 0, 2) if dtype.name == "int8" else (3, 5)).to(torch_dtype(dtype))
    head, tail = archive.frame(tuple(tensor.shape), dtype)
    content = head + bits_of(tensor).tobytes() + tail
    (tmp_path / "x.pt").write_bytes(content)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
    assert archive.tensor_in(memoryview(content), tmp_path) == (len(head), tuple(tensor.shape), dtype)


def test_an_empty_dictionary_is_what_torch_writes() -> None:
    stream = io.BytesIO()
    torch.save({}, stream)
    assert archive.empty_dict() == stream.getvalue()
    assert torch.load(io.BytesIO(archive.empty_dict()), weights_only=True) == {}


def test_a_tensor_in_memory_is_found(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    for tensor in (base.view(4, 6), base[6:18].view(3, 4), torch.tensor(3), torch.nn.Parameter(torch.ones(2))):
        stream = io.BytesIO()
        torch.save(tensor, stream)
        start, shape, dtype = archive.tensor_in(memoryview(stream.getvalue()), tmp_path)
        assert torch.equal(place(_written(tmp_path / "x", stream.getvalue(), dtype, shape, start)), tensor.detach())


def _written(path: Path, content: bytes, dtype: DType, shape: tuple[int, ...], start: int) -> TensorPlace:
    path.write_bytes(content)
    return TensorPlace(path, dtype, shape, start)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_stock({}), "something else than one tensor"),
        (_stock([torch.zeros(2)]), "something else than one tensor"),
        (_stock(torch.zeros(2, 3).t()), "gaps or turned around"),
        (_stock(torch.zeros(2, dtype=torch.complex64)), "ComplexFloatStorage"),
        (_stock(torch.zeros(2, 3))[:-1], "not a zip"),
        (_stock(torch.zeros(2, 3))[100:], "leaves the file|not a zip"),
        (b"", "not a zip"),
    ],
)
def test_what_is_no_tensor_in_memory_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"piece 7: .*({message})"):
        archive.tensor_in(memoryview(content), Path("piece 7"))


@settings(max_examples=300, deadline=None)
@given(spoil=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=8), cut=st.booleans())
@example(spoil=[(98 - at, 255) for at in range(8)], cut=False)
def test_a_damaged_zip_gives_a_tensor_or_one_line(spoil: list[tuple[int, int]], cut: bool) -> None:
    """Changed from the end, where the directory is, with numbers of 64 bits among it."""
    content = bytearray(_stock(torch.zeros(2, 3)))
    for at, value in spoil:
        content[-1 - at] = value
    with contextlib.suppress(CheckpointError):
        archive.tensor_in(memoryview(content)[cut:], Path("x"))


def test_a_member_beyond_what_a_file_can_hold_is_refused(tmp_path: Path) -> None:
    path, name = tmp_path / "x.pt", b"a/data.pkl"
    wide = struct.pack("<2HQ", 1, 8, (1 << 64) - 1)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, len(name), 12, 0, 0, 0, 0, (1 << 32) - 1)
    entry += name + wide
    path.write_bytes(entry + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0))
    with pytest.raises(CheckpointError, match="not a zip"):
        read(path)
    with pytest.raises(CheckpointError, match=r"not a zip|leaves"):
        archive.tensor_in(memoryview(path.read_bytes()), path)
