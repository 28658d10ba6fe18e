"""Hostile files: nothing in them runs, what they ask for takes bounded work, each ends in one clear line or a record.

That nothing runs is watched twice: by the traces that the programs would leave, and by Python's audit hook, which
reports every import, process and compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint import archive, pickles
from megatron_vita.checkpoint.archive import TorchFile
from megatron_vita.checkpoint.dtypes import torch_dtype
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
    count = torch.Size(tensor.shape).numel()
    kind = torch_dtype(tensor.dtype)
    return torch.frombuffer(content, dtype=kind, count=count).reshape(tensor.shape) if count else torch.empty(0)


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
    "not a pickle": (b"hello", "damaged"),
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
