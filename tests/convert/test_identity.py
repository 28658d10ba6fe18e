"""A model's folder is known by its content: it may move and be touched, and another content is another folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vita.convert import cli, identity
from megatron_vita.convert.identity import fingerprint
from tests.convert import publishers

pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    llm = publishers.write_qwen2(root / "llm")
    assert cli.main(["import", "--llm", str(llm), "--output", str(root / "ckpt")]) == 0
    (root / "megatron/mp_rank_00").mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(3)}}, root / "megatron/mp_rank_00/model_optim_rng.pt")
    return {"hf": llm, "checkpoint": root / "ckpt/iter_0000000", "megatron": root / "megatron"}


@pytest.mark.parametrize("kind", ["hf", "checkpoint", "megatron"])
def test_a_folder_may_move_and_be_touched(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[kind], tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(folders[kind])


def _flip(name: str, place: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "a setting": lambda folder: (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "rms_norm_eps": 2e-6})
    ),
    "a tokenizer": _flip("tokenizer.json", 100),
    "a name in the header": _flip(WEIGHTS, 20),
    "a value in the middle": _flip(WEIGHTS, 200_001),
    "the last byte": _flip(WEIGHTS, -1),
    "another name": lambda folder: (folder / WEIGHTS).rename(folder / "other.safetensors"),
    "a file less": lambda folder: (folder / WEIGHTS).unlink(),
    "a file more": lambda folder: save_file({"w": torch.zeros(2)}, folder / "more.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_content_is_another_folder(change: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["hf"], tmp_path / "hf")
    CHANGES[change](tmp_path / "hf")
    assert fingerprint(tmp_path / "hf") != fingerprint(folders["hf"])


def test_of_large_files_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first and last bytes are among them; what lies between two samples is not, and the documentation says so."""
    save_file({"w": torch.zeros(1 << 14)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(identity, "_SAMPLE_BYTES", 64)
    first = fingerprint(tmp_path)
    size = (tmp_path / "a.safetensors").stat().st_size
    read = 0
    for place in range(300, size, 499):
        _flip("a.safetensors", place)(tmp_path)
        read += fingerprint(tmp_path) != first
        _flip("a.safetensors", place)(tmp_path)
    assert read <= identity._SAMPLES
    for place in (size - 1, size - 64, (size - 64) * 7 // 15):
        _flip("a.safetensors", place)(tmp_path)
        assert fingerprint(tmp_path) != first
        _flip("a.safetensors", place)(tmp_path)
    assert fingerprint(tmp_path) == first
