"""Checkpoints on disk: parts are read as parts, damage and malice are found before anything is believed."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from megatron_vita import checkpoint
from megatron_vita.checkpoint import integrity, offline, writer
from megatron_vita.checkpoint.boxes import Slices
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, Integrity, write_integrity
from megatron_vita.checkpoint.tensors import TensorsInMemory
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.errors import CheckpointError, ConfigError, DamagedError
from megatron_vita.files import lock_file
from tests.checkpoint.tiny import stage, state
from tests.checkpoint.written import Evil

TENSORS = {
    "language_model.a.weight": torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5),
    "language_model.b.bias": torch.arange(3, dtype=torch.bfloat16),
    "vision_model.c": torch.randn(2, 3, 4, dtype=torch.float64),
    "vision_model.scalar": torch.tensor(5, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writer, "PIECE_BYTES", 40)  # several pieces a tensor
    run = state(stage(), 4, preprocess=PreprocessSpec(image_size=16, patch_size=4), consumed_packs=3)
    return checkpoint.write_tensors(tmp_path / "run", 4, TENSORS, run)


def test_round_trip(folder: Path) -> None:
    tensors = checkpoint.read_tensors(folder.parent)
    assert set(tensors) == set(TENSORS)
    for name, one in TENSORS.items():
        assert tensors.dtype(name) == one.dtype
        assert torch.equal(tensors[name], one)
    state_back = checkpoint.read_state(folder)
    assert (state_back.iteration, state_back.consumed_packs) == (4, 3)
    assert state_back.preprocess == PreprocessSpec(image_size=16, patch_size=4)
    assert (folder.parent / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def test_a_part_is_read_as_a_part(folder: Path) -> None:
    tensors = checkpoint.read_tensors(folder)
    part = tensors.read("language_model.a.weight", (slice(1, 6), slice(2, 4)))
    assert torch.equal(part, TENSORS["language_model.a.weight"][1:6, 2:4])


def test_only_what_is_read_is_verified_and_damage_names_the_tensor(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    first_piece = Integrity.read(folder).files["__0_0.distcp"]["pieces"][0][0]
    content[first_piece // 2] ^= 1
    file.write_bytes(content)
    tensors = checkpoint.read_tensors(folder)
    assert torch.equal(tensors["vision_model.c"], TENSORS["vision_model.c"])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp.*language_model.a.weight has changed"):
        tensors["language_model.a.weight"]
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: damaged at byte 0"):
        Integrity.read(folder).check_all()


@pytest.mark.parametrize("name", [".metadata", "run.json", "common.json", "note.md", "tokenizer/tokenizer.json"])
def test_a_flip_in_any_small_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    run, notes = state(stage(), 4), {"note.md": "of its writer"}
    folder = checkpoint.write_tensors(tmp_path / "run", 4, TENSORS, run, tmp_path / "tokenizer.json", notes=notes)
    assert checkpoint.resolve(folder) == folder
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert checkpoint.latest(folder.parent) is None
    with pytest.raises(DamagedError, match=rf"{name}: its content has changed"):
        checkpoint.read_tensors(folder.parent)


@pytest.mark.parametrize("name", [".metadata", "run.json", "common.json", "__0_0.distcp", INTEGRITY_FILE])
def test_a_truncated_or_missing_file_means_no_checkpoint(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3])
    assert checkpoint.latest(folder.parent) is None
    with pytest.raises(CheckpointError):
        checkpoint.resolve(folder)
    path.unlink()
    assert checkpoint.latest(folder.parent) is None


@pytest.mark.parametrize("name", [".metadata", INTEGRITY_FILE])
def test_a_file_too_large_to_be_what_it_should_be_is_not_read(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (folder / INTEGRITY_FILE).stat().st_size < 5000
    os.truncate(folder / name, 5001)  # a hole, which costs an attacker nothing
    if name != INTEGRITY_FILE:
        _forge(folder, {name: {"bytes": 5001, "xxh3_128": ""}})
    monkeypatch.setattr(integrity, "MAX_BYTES", 5000)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: is larger than 0 MiB"):
        checkpoint.read_tensors(folder)


def test_malicious_metadata_is_refused_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    pieces = {"__0_0.distcp": Integrity.read(folder).files["__0_0.distcp"]["pieces"]}
    trap = tmp_path / "sprung"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(trap)))
    # An attacker can write a correct integrity.json: digests are no signature.
    (folder / INTEGRITY_FILE).unlink()
    write_integrity(folder, pieces)
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.read_tensors(folder)
    assert not trap.exists()


def test_a_file_outside_the_folder_is_refused(folder: Path) -> None:
    files = json.loads((folder / INTEGRITY_FILE).read_text())["files"]
    (folder.parent / "outside").write_bytes(b"x")
    for name in ("../outside", str(folder.parent / "outside")):
        _forge(folder, {**files, name: {"bytes": 1, "xxh3_128": "0"}})
        with pytest.raises(CheckpointError, match="names a file outside the folder"):
            checkpoint.resolve(folder)


def _forge(folder: Path, files: Any, **values: Any) -> None:
    """An integrity.json whose own digest is right: anybody can compute it."""
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    forged = {"format_version": 3, "files": files, "digest": xxh3_128(text.encode()).hexdigest()} | values
    (folder / INTEGRITY_FILE).write_text(json.dumps(forged))


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, {"bytes": 1}, {"bytes": True, "xxh3_128": ""}, {"bytes": -1, "xxh3_128": ""},
        {"bytes": 1, "xxh3_128": 3}, {"bytes": 1, "pieces": 3}, {"bytes": 1, "pieces": [3]}, {"bytes": 1, "pieces": []},
        {"bytes": 1, "pieces": [[1]]}, {"bytes": 1, "pieces": [["1", ""]]}, {"bytes": 1, "pieces": [[1, 2]]},
        {"bytes": 1, "pieces": [[2, ""], [-1, ""]]}, {"bytes": 1, "pieces": [[2, ""]]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_describes_no_file_is_refused(folder: Path, entry: Any) -> None:
    (folder / "a").write_bytes(b"x")
    _forge(folder, {"a": entry})
    with pytest.raises(CheckpointError, match=r"integrity\.json: does not describe files"):
        checkpoint.resolve(folder)


def test_an_integrity_file_of_another_form_is_refused(folder: Path) -> None:
    _forge(folder, ["a"])
    with pytest.raises(CheckpointError, match="does not describe files"):
        checkpoint.resolve(folder)
    for version in ([], 4, True, "x" * 1000):
        _forge(folder, {}, format_version=version)
        with pytest.raises(CheckpointError, match=r"format version .{1,20} is not known"):
            checkpoint.resolve(folder)
    (folder / INTEGRITY_FILE).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.resolve(folder)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Broken(TensorsInMemory):
        def read_into(self, name: str, slices: Slices, out: torch.Tensor) -> None:
            raise CheckpointError("unreadable")

    with pytest.raises(CheckpointError, match="unreadable"):
        checkpoint.write_tensors(tmp_path / "run", 0, Broken({"a": torch.zeros(1)}), state(stage(), 0))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_where_that_is_meant(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"iter_0000004: exists, and is not to be replaced"):
        checkpoint.write_tensors(folder.parent, 4, {}, state(stage(), 4), replace=False)
    assert set(checkpoint.read_tensors(folder)) == set(TENSORS)
    with (
        lock_file(folder.parent / ".lock-iter_0000004"),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        checkpoint.write_tensors(folder.parent, 4, {}, state(stage(), 4))
    checkpoint.write_tensors(folder.parent, 4, {"other": torch.zeros(2)}, state(stage(), 4))
    assert list(checkpoint.read_tensors(folder)) == ["other"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", 40)
    monkeypatch.setattr(offline, "_FILE_BYTES", 100)  # many files, which threads write side by side
    first, second = (
        checkpoint.write_tensors(tmp_path / str(count), 4, TENSORS, state(stage(), 4), workers=count)
        for count in (1, 8)
    )
    names = sorted(path.name for path in first.iterdir())
    assert len([name for name in names if name.endswith(".distcp")]) > 2
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert str(tmp_path).encode() not in (first / ".metadata").read_bytes(), "a path of this machine"


def test_the_tokenizer_travels_but_weights_beside_it_do_not(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (source / name).write_text("{}")
    folder = checkpoint.write_tensors(tmp_path / "run", 0, TENSORS, state(stage(), 0), source)
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
