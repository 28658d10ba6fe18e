"""Files of Megatron's ranks that are not what they say, or that would run code: refused by name, nothing of them runs.

That nothing runs is watched twice: by the traces that the programs would leave, and by Python's audit hook.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.convert.rank_files import read_rank
from megatron_vita.errors import CheckpointError

EVENTS: list[str] = []
_WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "subprocess.",
    "socket.",
    "exec",
    "compile",
    "shutil.",
)
_watching = False
WEIGHTS = {"decoder.final_layernorm.weight": torch.arange(6.0)}


def _watch(event: str, arguments: Any) -> None:
    if _watching and event.startswith(_WATCHED):
        EVENTS.append(f"{event} {str(arguments)[:80]}")


sys.addaudithook(_watch)


def read(rank: Path) -> Any:
    """What is in a rank's file; fails if reading it does anything of its own."""
    global _watching
    EVENTS.clear()
    _watching = True
    try:
        return read_rank(rank)
    finally:
        _watching = False
        assert EVENTS == []


def save(rank: Path, content: object) -> Path:
    torch.save(content, rank / "model_optim_rng.pt")
    return rank


def save_program(rank: Path, program: bytes, *, compress: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save lays it out, around any program."""
    with zipfile.ZipFile(rank / "model_optim_rng.pt", "w", compress) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return rank


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch imports on first use."""
    rank = tmp_path_factory.mktemp("first")
    read_rank(save(rank, {"model": WEIGHTS}))
    with pytest.raises(CheckpointError):
        read_rank(save_program(rank, b"no"))


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def test_what_megatron_saves_beside_the_weights_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumerations of modules that are not installed, fp8 state, random generators, devices, functions of no weight."""
    kind = enum.Enum("AttnBackend", "flash fused", module="megatron.legacy.model.enums")
    there = types.ModuleType("megatron.legacy.model.enums")
    there.AttnBackend = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.legacy.model.enums", there)
    arguments = argparse.Namespace(
        num_layers=2,
        attention_backend=kind(1),
        params_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        data_path=["a"] * 3,
        rotary_base=1e6,
        seed=1 << 70,
    )
    generator = np.random.RandomState(5).get_state()
    states = {"np_rng_state": generator, "random_rng_state": (3, (1, 2), None), "torch": torch.get_rng_state()}
    weights = {**WEIGHTS, "decoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"fp8")}
    weights["parameter"] = torch.nn.Parameter(torch.ones(2, 2))
    rank = save(tmp_path, {"args": arguments, "model": weights, "rng_state": [states], "iteration": 5})
    with torch.serialization.safe_globals([np.ndarray, np.dtype, generator[1].__reduce__()[0]]):  # as transformers does
        found = read_rank(rank)
        assert np.ndarray in torch.serialization.get_safe_globals()
    monkeypatch.undo()
    assert set(found.tensors) == {*WEIGHTS, "parameter"}
    assert torch.equal(found.tensors["decoder.final_layernorm.weight"], torch.arange(6.0))
    assert not found.tensors["parameter"].requires_grad
    plain = {"num_layers": 2, "rotary_base": 1e6}
    assert {key: found.settings[key] for key in plain} == plain
    assert found.settings["attention_backend"] == found.settings["seed"] == found.settings["data_path"] == "an object"


def _programs(trace: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (program, what the refusal names)."""
    command = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w')"

    def dumps(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)

    return {
        "os.system": (dumps(Call(os.system, command)), r"(posix|nt)\.system"),
        "subprocess": (dumps(Call(subprocess.Popen, ["touch", str(trace)])), "Popen"),
        "eval": (dumps(Call(eval, code)), "eval"),
        "exec": (dumps(Call(exec, code)), "exec"),
        "getattr": (dumps(Call(getattr, Call(__import__, "os"), "system")), "getattr|__import__"),
        "torch.load": (dumps(Call(torch.load, str(trace))), r"torch\.serialization\.load"),
        "inside the weights": (dumps({"model": {"a": Call(os.system, command)}}), r"(posix|nt)\.system"),
        "inside the settings": (dumps({"args": argparse.Namespace(a=Call(os.system, command))}), r"(posix|nt)\.system"),
        "a state for what is allowed": (
            b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\x00\x00\x00__class__cos\nsystem\nsb.",
            r"os\.system",
        ),
        "a name that a newer protocol stacks": (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
            "cannot be read",
        ),
        "another persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "cannot be read"),
        "no pickle": (b"hello", "cannot be read"),
        "an unfinished one": (b"\x80\x02}(", "cannot be read"),
        "underflow": (b"\x80\x02R.", "cannot be read"),
        "a giant text": (b"\x80\x02X\xff\xff\xff\xff.", "cannot be read|no weights"),
    }


@pytest.mark.parametrize("name", _programs(Path("x")))
def test_a_hostile_file_is_refused_by_name_and_does_not_run(name: str, tmp_path: Path) -> None:
    program, named = _programs(tmp_path / "trace")[name]
    with pytest.raises(CheckpointError, match=named) as refused:
        read(save_program(tmp_path, program))
    assert str(tmp_path / "model_optim_rng.pt") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "trace").exists()


def _meta() -> torch.Tensor:
    return torch.empty(1 << 40, device="meta")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(1).expand(1 << 20), "has gaps or is turned around"),
        (torch.zeros(3, 5).t(), "has gaps or is turned around"),
        (torch.zeros(3, 3).to_sparse(), "is no tensor of plain numbers"),
        (_meta(), "is no tensor of plain numbers"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "is no tensor of plain numbers"),
        (torch.zeros(3, dtype=torch.complex64), "is no tensor of plain numbers"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is no tensor of plain numbers"),
        (5, "under `model` is no tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_weight_is_refused(value: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model_optim_rng.pt: w {says}"):
        read(save(tmp_path, {"model": {"w": value}}))


def _legacy(rank: Path) -> None:
    torch.save({"model": WEIGHTS}, rank / "model_optim_rng.pt", _use_new_zipfile_serialization=False)


def _cut(rank: Path) -> None:
    path = save(rank, {"model": WEIGHTS}) / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_legacy, "not a zip as torch.save writes since torch 1.6 .*must be saved anew in a sandbox"),
        (_cut, "not a zip as torch.save writes since torch 1.6"),
        (lambda rank: (rank / "model_optim_rng.pt").write_bytes(b""), "not a zip"),
        (lambda rank: save_program(rank, b"x" * 99, compress=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (lambda rank: None, "no such file. The download is incomplete"),
        (lambda rank: save(rank, {"model0": WEIGHTS}), "virtual pipeline stages"),
        (lambda rank: save(rank, [WEIGHTS]), "holds no weights under `model`"),
    ],
)
def test_a_file_of_another_kind_is_refused(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    rank = tmp_path_factory.getbasetemp() / "rank"
    rank.mkdir(exist_ok=True)
    path = save(rank, {"model": WEIGHTS, "args": argparse.Namespace(a=1)}) / "model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        for one in read_rank(rank).tensors.values():
            one.sum()
