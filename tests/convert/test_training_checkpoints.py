"""Checkpoints of earlier releases are exported: cut over many ranks, with an optimizer inside."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_vita import checkpoint
from megatron_vita.checkpoint import stored, streams
from megatron_vita.checkpoint.metadata import StoredPiece
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.convert import cli
from tests.convert import publishers

pytest.importorskip("transformers")

RANKS = 8


def convert(*arguments: object) -> None:
    assert cli.main([str(one) for one in arguments]) == 0


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a decoder; ckpt: its import, in one file."""
    root = tmp_path_factory.mktemp("imported")
    publishers.write_decoder(root / "hf", hidden_size=96, num_attention_heads=16, num_key_value_heads=8)
    convert("import", "--llm", root / "hf", "--output", root / "ckpt")
    return root


def of_rank(tensors: CheckpointTensors, rank: int, rows: int) -> Iterator[tuple[str, torch.Size, list[int], Tensor]]:
    """(key, shape of the whole, offsets, values) of what one of RANKS tensor-parallel ranks is answerable for: the
    model, and moments of the optimizer; cut into pieces of `rows` rows."""
    for key in tensors:
        whole = tensors[key]
        axis = 1 if "linear_proj" in key or "linear_fc2" in key else 0
        if "norm" in key and rank:
            continue
        parts = whole.tensor_split(1 if "norm" in key else RANKS, axis)
        offsets = [0] * whole.dim()
        offsets[axis] = sum(one.shape[axis] for one in parts[:rank])
        for piece in parts[rank].split(rows):
            yield key, whole.shape, list(offsets), piece.contiguous().clone()
            yield f"optimizer.state.exp_avg.{key}", whole.shape, list(offsets), torch.rand_like(piece)
            offsets[0] += len(piece)


def write_as_training_did(imported: Path, step: Path, version: int, rows: int = 1 << 30) -> None:
    """By hand: parts of tensors by torch.save, .metadata by Python's pickler, SHA-256 in version 1's integrity.json."""
    old, algorithm = imported / "ckpt/iter_0000000", "sha256" if version == 1 else "xxh3_128"

    def hexadecimal(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if version == 1 else xxhash.xxh3_128(content).hexdigest()

    step.mkdir(parents=True)
    shutil.copy(old / "run.json", step / "run.json")
    shutil.copytree(old / "tokenizer", step / "tokenizer")
    torch.save({}, step / "common.pt")
    metadata = stock.Metadata({}, storage_data={})
    pieces: dict[str, list[list[object]]] = {}
    for rank in range(RANKS):
        name, content = f"__{rank}_0.distcp", b""
        pieces[name] = []
        for key, shape, offsets, data in of_rank(checkpoint.read_tensors(old), rank, rows):
            file = io.BytesIO()
            torch.save(data, file)
            entry = stock.TensorStorageMetadata(stock.TensorProperties(data.dtype), shape, [])
            entry = metadata.state_dict_metadata.setdefault(key, entry)
            index = stock.MetadataIndex(key, torch.Size(offsets), len(entry.chunks))
            metadata.storage_data[index] = _StorageInfo(name, len(content), len(file.getvalue()))
            entry.chunks.append(stock.ChunkStorageMetadata(torch.Size(offsets), data.shape))
            pieces[name].append([len(file.getvalue()), hexadecimal(file.getvalue())])
            content += file.getvalue()
        (step / name).write_bytes(content)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    files = {}
    for path in sorted(one for one in step.rglob("*") if one.is_file()):
        name, content = path.relative_to(step).as_posix(), path.read_bytes()
        digest = {"pieces": pieces[name]} if name in pieces else {algorithm: hexadecimal(content)}
        files[name] = {"bytes": len(content), **digest}
    text = json.dumps(files, sort_keys=True, separators=(",", ":")).encode()
    (step / "integrity.json").write_text(
        json.dumps({"format_version": version, "files": files, "digest": hexadecimal(text)})
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_it_is_exported_as_the_model_that_it_is(imported: Path, tmp_path: Path, version: int) -> None:
    step = tmp_path / "run/iter_0000007"
    write_as_training_did(imported, step, version)
    convert("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf", "--format", "llm")
    publishers.same_bytes(publishers.tensors_of(tmp_path / "hf"), publishers.tensors_of(imported / "hf"))
    convert("verify", tmp_path / "run", imported / "hf")
    convert("verify", tmp_path / "run")


@pytest.mark.parametrize("version", [1, 2])
def test_damage_is_found(imported: Path, tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "run/iter_0000007"
    write_as_training_did(imported, step, version)
    path = step / "__3_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(b"data/0") + 600] ^= 1
    path.write_bytes(content)
    flags = ["--checkpoint", str(step), "--output", str(tmp_path / "hf"), "--format", "llm"]
    assert cli.main(["export", *flags]) == 1
    assert "__3_0.distcp: the part that holds" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_no_part_is_read_again_and_again(
    imported: Path, tmp_path: Path, version: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a tensor that is cut over its columns lies in as many parts as there are ranks: they do not push each
    other out of memory, however large they are."""
    step = tmp_path / "run/iter_0000007"
    write_as_training_did(imported, step, version, rows=4)
    monkeypatch.setattr(stored, "_CACHE_BYTES", 2000)
    monkeypatch.setattr("megatron_vita.convert.verify._BLOCK_BYTES", 2000)
    reads: collections.Counter[tuple[str, int]] = collections.Counter()
    read = CheckpointTensors.read_piece

    def counted(self: CheckpointTensors, name: str, piece: StoredPiece) -> Tensor:
        reads[piece.file, piece.position] += 1
        return read(self, name, piece)

    monkeypatch.setattr(CheckpointTensors, "read_piece", counted)
    convert("verify", imported / "hf", step, "--workers", workers)
    assert sum(reads.values()) <= 1.5 * len(reads)
    assert max(reads.values()) <= 1 + workers, reads.most_common(3)


def test_more_threads_than_do_good_do_not_take_more_memory() -> None:
    """What is begun ahead is bounded by their number."""
    begun = []
    with streams.Workers(1000) as pool:
        results = pool.map(begun.append, range(1000))
        next(results)
        assert len(begun) <= 2 * streams.MAX_WORKERS
        list(results)
    assert len(begun) == 1000
