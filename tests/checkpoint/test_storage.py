"""Pieces written by ranks: any tensor comes back bit for bit, and what does not make up a tensor is not published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vita.checkpoint import storage
from megatron_vita.checkpoint.dtypes import BFLOAT16, FLOAT32, bits_of
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.storage import WrittenPiece, WrittenSlice, write_metadata, write_pieces
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.errors import CheckpointError
from megatron_vita.files import new_digest

BASE = torch.arange(6 * 10, dtype=torch.float32).reshape(6, 10)
TENSORS = {
    "plain": BASE,
    "turned": BASE.T,
    "strided": BASE[::2, 1::3],
    "expanded": BASE[:, :1].expand(6, 4),
    "a view": BASE[2:3, 4:],
    "scalar": torch.tensor(3, dtype=torch.int64),
    "a view without dimensions": BASE[3, 3],
    "no rows": torch.empty(0, 4),
    "no columns": torch.empty(4, 0, dtype=torch.bfloat16),
    "truths": torch.tensor([True, False, True]),
    "half": BASE.half(),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "parameter": torch.nn.Parameter(BASE.double()),
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def of(key: str, data: torch.Tensor) -> WrittenSlice:
    return WrittenSlice(key, tuple(data.shape), (0,) * data.dim(), data)


def finish(folder: Path, written: list[WrittenPiece]) -> CheckpointTensors:
    write_metadata(folder, written)
    write_integrity(folder, {"file": [(one.length, one.digest) for one in written]})
    return CheckpointTensors(folder)


@pytest.mark.parametrize("piece_bytes", [24, 1 << 20])
def test_any_tensor_comes_back_bit_for_bit(tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", piece_bytes)
    written = write_pieces(tmp_path, "file", (of(key, one) for key, one in TENSORS.items()))
    assert (len(written) == len(TENSORS)) == (piece_bytes > 24)
    assert [one.position for one in written] == [sum(two.length for two in written[:n]) for n in range(len(written))]
    tensors = finish(tmp_path, written)
    tensors.integrity.check_all()
    for key, one in TENSORS.items():
        found = tensors[key]
        assert (found.dtype, found.shape) == (one.dtype, one.shape)
        assert np.array_equal(tensors.bits(key), bits_of(one))


@pytest.mark.parametrize("where", ["head", "tail"])
def test_what_surrounds_a_tensor_is_read_unless_it_is_what_we_write(tmp_path: Path, where: str) -> None:
    """Another reader goes by it: bytes that it would not take for the tensor are none for us, whatever digests say."""
    (one,) = write_pieces(tmp_path, "file", [of("a", BASE)])
    content = bytearray((tmp_path / "file").read_bytes())
    at = {"head": 0, "tail": content.rindex(b"PK\1\2")}[where]
    content[at : at + 2] = b"no"
    (tmp_path / "file").write_bytes(content)
    digest = new_digest()
    digest.update(bytes(content))
    tensors = finish(tmp_path, [dataclasses.replace(one, digest=digest.hexdigest())])
    with pytest.raises(CheckpointError, match="file: "):
        tensors.bits("a")


def test_a_type_that_is_not_supported_is_named_with_its_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.b: a tensor of type torch\.complex64 cannot be saved"):
        write_pieces(tmp_path, "file", [of("a.b", torch.zeros(2, dtype=torch.complex64))])


def test_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    assert write_pieces(tmp_path, "file", []) == []
    assert not list(tmp_path.iterdir())


def pieces(*places: tuple[tuple[int, ...], tuple[int, ...]]) -> list[WrittenPiece]:
    one = WrittenPiece("key", (3, 3), (0, 0), (3, 3), FLOAT32, "file", 0, 9, "")
    return [dataclasses.replace(one, offsets=offsets, sizes=sizes) for offsets, sizes in places]


def test_parts_make_up_their_tensor_exactly(tmp_path: Path) -> None:
    write_metadata(tmp_path, pieces(((0, 0), (3, 2)), ((0, 2), (3, 1))))
    bad = {
        "a gap": pieces(((0, 0), (3, 2))),
        "twice": pieces(((0, 0), (3, 3)), ((0, 0), (3, 3))),
        "an overlap of the right volume": pieces(((0, 0), (2, 2)), ((1, 1), (2, 2)), ((2, 0), (1, 1))),
        "two at one place": pieces(((0, 0), (3, 3)), ((0, 0), (0, 3))),
        "outside": pieces(((0, 1), (3, 3))),
    }
    for parts in bad.values():
        with pytest.raises(CheckpointError, match=r"^key: its parts do not hold each element of \(3, 3\) once"):
            write_metadata(tmp_path, parts)
    other = [*pieces(((0, 0), (3, 2))), *(dataclasses.replace(one, global_shape=(4, 3)) for one in bad["a gap"])]
    with pytest.raises(
        CheckpointError, match=r"^key: ranks disagree about its shape: \(3, 3\) float32, \(4, 3\) float32"
    ):
        write_metadata(tmp_path, other)
    first, second = pieces(((0, 0), (3, 2)), ((0, 2), (3, 1)))
    with pytest.raises(CheckpointError, match=r"^key: ranks disagree .*: \(3, 3\) bfloat16, \(3, 3\) float32"):
        write_metadata(tmp_path, [first, dataclasses.replace(second, dtype=BFLOAT16)])
