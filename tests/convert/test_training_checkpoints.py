"""Checkpoints as training writes them are exported: cut over many ranks, with an optimizer inside, or of version 1."""

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
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_vita import checkpoint
from megatron_vita.checkpoint import storage, stored, streams
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.metadata import StoredPiece
from megatron_vita.checkpoint.storage import WrittenSlice, write_metadata, write_pieces
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


def of_rank(tensors: CheckpointTensors, rank: int) -> Iterator[WrittenSlice]:
    """What one of RANKS tensor-parallel ranks is answerable for: the model, and moments of the optimizer."""
    for key in tensors:
        whole = tensors[key]
        axis = 1 if "linear_proj" in key or "linear_fc2" in key else 0
        if "norm" in key and rank:
            continue
        count = 1 if "norm" in key else RANKS
        part, offsets = whole.tensor_split(count, axis)[rank], [0] * whole.dim()
        offsets[axis] = sum(one.shape[axis] for one in whole.tensor_split(count, axis)[:rank])
        part = part.clone(memory_format=torch.contiguous_format)
        yield WrittenSlice(key, tuple(whole.shape), tuple(offsets), part)
        yield WrittenSlice(f"optimizer.state.exp_avg.{key}", tuple(whole.shape), tuple(offsets), torch.rand_like(part))


def _others(imported: Path, step: Path) -> CheckpointTensors:
    old = imported / "ckpt/iter_0000000"
    step.mkdir(parents=True)
    for name in ("run.json", "common.pt", "metadata.json"):
        shutil.copy(old / name, step / name)
    shutil.copytree(old / "tokenizer", step / "tokenizer")
    return checkpoint.read_tensors(old)


def write_as_training_does(imported: Path, step: Path) -> None:
    tensors = _others(imported, step)
    written = []
    for rank in range(RANKS):
        written += write_pieces(step, f"__{rank}_0.distcp", of_rank(tensors, rank))
    write_metadata(step, written)
    digests = collections.defaultdict(list)
    for one in written:
        digests[one.file].append((one.length, one.digest))
    write_integrity(step, digests)


def write_version_1(imported: Path, step: Path) -> None:
    """By hand: whole parts of tensors by torch.save, .metadata by Python's pickler, SHA-256 in integrity.json."""
    tensors = _others(imported, step)
    metadata = stock.Metadata({}, storage_data={})
    pieces: dict[str, list[list[object]]] = {}
    for rank in range(RANKS):
        name, content = f"__{rank}_0.distcp", b""
        pieces[name] = []
        for piece in of_rank(tensors, rank):
            file = io.BytesIO()
            torch.save(piece.data, file)
            properties = stock.TensorProperties(piece.data.dtype)
            entry = stock.TensorStorageMetadata(properties, torch.Size(piece.global_shape), [])
            entry = metadata.state_dict_metadata.setdefault(piece.key, entry)
            index = stock.MetadataIndex(piece.key, torch.Size(piece.offsets), len(entry.chunks))
            metadata.storage_data[index] = _StorageInfo(name, len(content), len(file.getvalue()))
            entry.chunks.append(stock.ChunkStorageMetadata(torch.Size(piece.offsets), piece.data.shape))
            pieces[name].append([len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest()])
            content += file.getvalue()
        (step / name).write_bytes(content)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    files = {}
    for path in sorted(one for one in step.rglob("*") if one.is_file()):
        name, content = path.relative_to(step).as_posix(), path.read_bytes()
        digest = {"pieces": pieces[name]} if name in pieces else {"sha256": hashlib.sha256(content).hexdigest()}
        files[name] = {"bytes": len(content), **digest}
    text = json.dumps(files, sort_keys=True, separators=(",", ":")).encode()
    values = {"format_version": 1, "files": files, "digest": hashlib.sha256(text).hexdigest()}
    (step / "integrity.json").write_text(json.dumps(values))


WRITERS = {"training": write_as_training_does, "version 1": write_version_1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_it_is_exported_as_the_model_that_it_is(imported: Path, tmp_path: Path, kind: str) -> None:
    step = tmp_path / "run/iter_0000007"
    WRITERS[kind](imported, step)
    convert("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf", "--format", "llm")
    publishers.same_bytes(publishers.tensors_of(tmp_path / "hf"), publishers.tensors_of(imported / "hf"))
    convert("verify", tmp_path / "run", imported / "hf")


@pytest.mark.parametrize("kind", WRITERS)
def test_damage_is_found(imported: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "run/iter_0000007"
    WRITERS[kind](imported, step)
    path = step / "__3_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(b"data/0") + 600] ^= 1
    path.write_bytes(content)
    flags = ["--checkpoint", str(step), "--output", str(tmp_path / "hf"), "--format", "llm"]
    assert cli.main(["export", *flags]) == 1
    assert "__3_0.distcp: the part that holds" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_part_is_read_again_and_again(
    imported: Path, tmp_path: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a tensor that is cut over its columns lies in as many parts as there are ranks: they do not push each
    other out of memory, however large they are."""
    step = tmp_path / "run/iter_0000007"
    monkeypatch.setattr(storage, "PIECE_BYTES", 400)
    WRITERS[kind](imported, step)
    monkeypatch.setattr(stored, "_CACHE_BYTES", 2000)
    monkeypatch.setattr("megatron_vita.convert.verify.BLOCK_BYTES", 1000)
    monkeypatch.setattr("megatron_vita.convert.verify._RUN_BYTES", 2000)
    reads: collections.Counter[StoredPiece] = collections.Counter()
    read = CheckpointTensors._read_piece

    def counted(self: CheckpointTensors, name: str, stored: StoredPiece) -> object:
        reads[stored] += 1
        return read(self, name, stored)

    monkeypatch.setattr(CheckpointTensors, "_read_piece", counted)
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
