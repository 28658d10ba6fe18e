"""Checkpoints of format version 2, written by the release before: read to the bit, gone on from, refused if damaged.

The archives were written by that release: two data-parallel ranks, a tiny model and its optimizer after two steps. Each
holds the gradient norms of the three steps that followed, and a digest of every tensor, as that release read them.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita import checkpoint
from megatron_vita.checkpoint import sharded
from megatron_vita.checkpoint.offline import tensor_sha256
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.errors import CheckpointError, DamagedError
from tests.checkpoint.tiny import Trainer
from tests.checkpoint.written import Evil
from tests.ranks import run_ranks

TYPES = ("float32", "bfloat16")


def unpack(kind: str, target: Path) -> tuple[Path, Any]:
    """(the checkpoint, what its writer said of it)."""
    with tarfile.open(Path(__file__).with_name(f"version_2_{kind}.tar.xz")) as archive:
        archive.extractall(target, filter="data")
    return target / "iter_0000002", json.loads((target / "expected.json").read_text())


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_is_read_to_the_bit(tmp_path: Path, kind: str) -> None:
    folder, expected = unpack(kind, tmp_path)
    tensors = checkpoint.read_tensors(folder)
    assert tensors.integrity.version == 2
    tensors.integrity.check_all()
    assert {key: tensor_sha256(tensors[key]) for key in tensors} == expected["sha256"]


def _go_on(folder: str, norms: list[float]) -> None:
    settings = checkpoint.read_state(folder).stage
    trainer = Trainer(settings)
    for model in trainer.models:
        for parameter in model.parameters():
            parameter.data.fill_(3)  # all must be overwritten
    run = checkpoint.load_training(folder, trainer.models, trainer.optimizer, trainer.scheduler)
    assert (run.iteration, run.consumed_packs, run.extra) == (2, 7, {"note": [1, 2]})
    root = Path(folder).with_name("again")
    again = checkpoint.save(root, trainer.wrapped, trainer.optimizer, trainer.scheduler, run, trainer.groups)
    assert [trainer.step() for _ in range(3)] == pytest.approx(norms, rel=1e-6)
    if dist.get_rank() == 0:
        old, new = CheckpointTensors(Path(folder)), CheckpointTensors(again)
        assert new.integrity.version == 3
        for key in new:
            assert tensor_sha256(new[key]) == tensor_sha256(old[key]), key
        left = set(old) - set(new)
        if settings.train.bf16:
            assert not left
        else:  # a float32 weight is its own master
            assert left == {f"optimizer.state.param.{key}" for key in new if not key.startswith("optimizer.")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_training_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    folder, expected = unpack(kind, tmp_path)
    run_ranks(2, _go_on, str(folder), expected["norms"])


def _refused(folder: str, name: str) -> None:
    trainer = Trainer(checkpoint.RunState.read(Path(folder)).stage)
    with pytest.raises(DamagedError, match=name):
        checkpoint.load_training(folder, trainer.models, trainer.optimizer, trainer.scheduler)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "integrity.json"])
def test_a_flip_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder, _ = unpack("float32", tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"iter_0000002/{name}: "):
        checkpoint.resolve(tmp_path)


@pytest.mark.slow
def test_a_flip_in_a_piece_is_refused_on_every_rank(tmp_path: Path) -> None:
    folder, _ = unpack("float32", tmp_path)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    run_ranks(2, _refused, str(folder), r"__0_0\.distcp: the part that holds .* has changed")


@pytest.mark.parametrize("content", ["evil", "other"])
def test_malice_in_common_pt_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, _ = unpack("float32", tmp_path)
    tensors, trap, stream = CheckpointTensors(folder), tmp_path / "sprung", io.BytesIO()
    torch.save({"optimizer": Evil(trap) if content == "evil" else 3}, stream)
    monkeypatch.setattr(tensors.integrity, "read_file", lambda name: stream.getvalue())  # anybody can forge a digest
    with pytest.raises(CheckpointError, match=r"common\.pt: refused"):
        sharded._common(tensors)
    assert not trap.exists()
