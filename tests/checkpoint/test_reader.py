"""Parts in any layout, read from parts in any other: the same values as slicing gives, from each piece read once."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint import writer
from megatron_vita.checkpoint.boxes import Slices, boxes_of_run, extent, overlap, whole
from megatron_vita.checkpoint.holdings import share
from megatron_vita.checkpoint.parts import Part
from megatron_vita.checkpoint.reader import read
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.tensors import slice_of
from megatron_vita.errors import DamagedError
from tests.checkpoint.written import all_of, cut_at_random, write_parts

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def dealt(tensors: dict[str, torch.Tensor], ranks: int, chance: random.Random) -> list[list[Part]]:
    """Every element of some tensors, held by one rank each."""
    held: list[list[Part]] = [[] for _ in range(ranks)]
    for key, one in tensors.items():
        for box in cut_at_random(whole(one.shape), chance):
            chance.choice(held).append(Part(key, tuple(one.shape), box, slice_of(one, box)))
    return held


def empty(key: str, tensor: torch.Tensor, box: Slices) -> Part:
    """Where a box is to be read to: memory in another order, that holds something else."""
    memory = torch.full(extent(box)[::-1], 1, dtype=tensor.dtype)
    return Part(key, tuple(tensor.shape), box, memory.permute(tuple(reversed(range(len(box))))))


@pytest.mark.slow
@settings(max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    piece_bytes=st.sampled_from([8, 64, 1 << 20]),
    seed=st.integers(0, 2**32),
)
def test_any_layout_is_read_by_any_other(
    shapes: list[tuple[int, ...]], ranks: tuple[int, int], piece_bytes: int, seed: int
) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {f"t{at}": torch.randn(shape).mul(9).to(chance.choice(DTYPES)) for at, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(writer, "PIECE_BYTES", piece_bytes):
        stored = write_parts(Path(folder) / "x", dealt(tensors, ranks[0], chance))
        for rank in dealt(tensors, ranks[1], chance):
            parts = [empty(part.key, tensors[part.key], part.box) for part in rank if chance.random() < 0.7]
            count = read(parts, stored)
            for part in parts:
                assert torch.equal(part.data, slice_of(tensors[part.key], part.box))
            needed = {
                (piece.file, piece.position): piece.length
                for part in parts
                for piece in stored.stored[part.key].pieces
                if overlap(piece.box, part.box) is not None
            }
            assert count == sum(needed.values()), "a piece was read twice, or one that nobody needs"


def test_in_the_same_layout_a_rank_reads_what_it_has_written(tmp_path: Path) -> None:
    tensor = torch.randn(599, 701)
    held: list[list[Part]] = []
    for index in range(4):
        boxes = boxes_of_run(tensor.shape, *share(0, tensor.numel(), index, 4))
        held.append([Part("a", (599, 701), box, tensor[box]) for box in boxes])
    stored = write_parts(tmp_path / "x", held)
    for rank in held:
        own = sum(part.data.nbytes for part in rank)
        count = read([empty("a", tensor, part.box) for part in rank], stored)
        assert own < count <= own + 2000 * len(rank)


def test_weights_of_another_type_are_converted(tmp_path: Path) -> None:
    stored = write_parts(tmp_path / "x", [[all_of("a", torch.tensor([1.0, 2.0001, 3.0]))]])
    part = all_of("a", torch.zeros(3, dtype=torch.bfloat16))
    read([part], stored)
    assert part.data.tolist() == [1.0, 2.0, 3.0]


def test_parts_that_would_be_taken_for_one_another_are_no_plan(tmp_path: Path) -> None:
    stored = write_parts(tmp_path / "x", [[all_of("a", torch.zeros(3))]])
    with pytest.raises(AssertionError, match="two parts of this rank begin at one element"):
        read([all_of("a", torch.zeros(3)), Part("a", (3,), (slice(0, 2),), torch.zeros(2))], stored)


def test_damage_is_named_and_only_where_it_is_read(tmp_path: Path) -> None:
    fine, hurt = all_of("fine", torch.ones(5)), all_of("hurt", torch.ones(5))
    stored = write_parts(tmp_path / "x", [[fine, hurt]])
    path, piece = tmp_path / "x/__0_0.distcp", stored.stored["hurt"].pieces[0]
    content = bytearray(path.read_bytes())
    content[piece.position + piece.length // 2] ^= 1
    path.write_bytes(content)
    again = CheckpointTensors(tmp_path / "x")
    read([fine], again)
    with pytest.raises(DamagedError, match=r"__0_0\.distcp: the part that holds hurt has changed"):
        read([fine, hurt], again)
    path.unlink()
    with pytest.raises(DamagedError, match=r"__0_0\.distcp: cannot be read \(No such file"):
        read([fine], again)
