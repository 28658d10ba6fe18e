"""Parts written by ranks: any tensor comes back bit for bit, and what does not make up a tensor is not published."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_vita.checkpoint import writer
from megatron_vita.checkpoint.boxes import slices_at
from megatron_vita.checkpoint.offline import tensor_sha256
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.writer import Planner, Writer, write
from megatron_vita.errors import CheckpointError
from tests.checkpoint.written import all_of, write_parts

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


@pytest.mark.parametrize("piece_bytes", [24, 1 << 20])
def test_any_tensor_comes_back_bit_for_bit(tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", piece_bytes)
    tensors = write_parts(tmp_path / "x", [[all_of(key, one) for key, one in TENSORS.items()]])
    tensors.integrity.check_all()
    pieces = [piece for one in tensors.stored.values() for piece in one.pieces]
    assert (len(pieces) == len(TENSORS)) == (piece_bytes > 24)
    assert sum(piece.length for piece in pieces) == (tmp_path / "x/__0_0.distcp").stat().st_size
    stock = {key: torch.empty_like(one, memory_format=torch.contiguous_format) for key, one in TENSORS.items()}
    dcp.load(stock, storage_reader=dcp.FileSystemReader(tmp_path / "x"), no_dist=True)
    for key, one in TENSORS.items():
        for found in (tensors[key], stock[key]):
            assert (found.dtype, found.shape) == (one.dtype, one.shape)
            assert tensor_sha256(found) == tensor_sha256(one)


def test_a_view_is_written_without_the_rest_of_its_memory(tmp_path: Path) -> None:
    large = torch.zeros(1 << 20)
    tensors = write_parts(tmp_path / "x", [[all_of("a", large[5:8])]])
    assert sum(path.stat().st_size for path in tensors.folder.glob("*.distcp")) < 2000


def test_a_rank_begins_another_file_after_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [all_of(str(number), BASE + number) for number in range(7)]
    writing = Writer(tmp_path, lambda: None, lambda pieces: None, file_bytes=2 * BASE.nbytes)
    files = list(writing._files(Planner(parts).create_local_plan().items))
    assert [len(one) for one in files] == [2, 2, 2, 1]


def test_a_type_that_is_not_supported_is_named_with_its_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.b: a tensor of type torch\.complex64 cannot be saved"):
        write_parts(tmp_path / "x", [[all_of("a.b", torch.zeros(2, dtype=torch.complex64))]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_value_that_is_not_finite_is_named_with_its_tensor(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    fine = [all_of("most", torch.full((3,), torch.finfo(dtype).max, dtype=dtype)), all_of("n", torch.tensor([1 << 62]))]
    write_parts(tmp_path / "x", [fine], finite=True)
    bad = torch.ones(50, 2, dtype=dtype)
    bad[37, 1] = value
    with pytest.raises(CheckpointError, match=r"^optimizer\.a holds values that are not finite"):
        write_parts(tmp_path / "y", [fine, [all_of("optimizer.a", bad)]], finite=True)
    assert not (tmp_path / "y/.metadata").exists()


def parts(*places: tuple[tuple[int, ...], tuple[int, ...]], rows: int = 3, dtype: torch.dtype = torch.float32) -> list:
    return [Part("key", (rows, 3), slices_at(*one), torch.zeros(one[1], dtype=dtype)) for one in places]


@pytest.mark.parametrize(
    "bad",
    [
        parts(((0, 0), (3, 2))),
        parts(((0, 0), (3, 3)), ((0, 0), (3, 3))),
        parts(((0, 0), (2, 2)), ((1, 1), (2, 2)), ((2, 0), (1, 1))),
        parts(((0, 0), (3, 3)), ((0, 0), (0, 3))),
        parts(((0, 1), (3, 3))),
    ],
    ids=["a gap", "twice", "an overlap of the right volume", "two at one place", "outside"],
)
def test_parts_make_up_their_tensor_exactly(tmp_path: Path, bad: list[Part]) -> None:
    for ranks in ([bad], [[one] for one in bad]):
        with pytest.raises(CheckpointError, match=r"^key: its parts do not hold each element of \(3, 3\) once"):
            write_parts(tmp_path / "x", ranks)
    assert not list(tmp_path.iterdir())


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    left, right = ((0, 0), (3, 2)), ((0, 2), (3, 1))
    write_parts(tmp_path / "good", [parts(left), parts(right)])
    for other in (parts(right, rows=4), parts(right, dtype=torch.bfloat16)):
        with pytest.raises(CheckpointError, match=r"^key: ranks disagree about its shape or type: .*\(3, 3\).*float32"):
            write_parts(tmp_path / "bad", [parts(left), other])


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    published: list[object] = []
    for content in ({"a": BASE}, {}):  # while pieces are written, and while `.metadata` is
        if not content and call == "write":
            continue  # Python's own files do not call it
        planned = [all_of(key, one) for key, one in content.items()]
        writing = Writer(tmp_path, lambda: None, published.append)
        with pytest.raises(CheckpointError, match=rf"{tmp_path}.*could not be written \(No space left.* Make room"):
            write(Planner(planned), writing, {one.label: one.data for one in planned}, alone=True)
    assert not published


def test_numbers_go_with_the_tensors_the_largest_of_all_ranks(tmp_path: Path) -> None:
    """A rank without parameters to train has counted no step."""
    plans = [Planner([], common=one).create_local_plan() for one in ({"step": 0}, {"step": 7, "other": 2}, {})]
    _, metadata = Planner([]).create_global_plan(plans)
    writing = Writer(tmp_path, lambda: None, lambda pieces: None)
    writing.set_up_storage_writer(True)
    writing.finish(metadata, [[]])
    assert (tmp_path / "common.json").read_text() == '{"step": 7, "other": 2}\n'
