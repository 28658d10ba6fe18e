"""Many threads that read a checkpoint through a cache and buffers too small for it: every byte is the right one."""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.checkpoint import stored, streaming, streams
from megatron_vita.checkpoint.dtypes import FLOAT32, Bits, bits_of, by_name
from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, write_integrity
from megatron_vita.checkpoint.lazy import Slices, slice_of, whole
from megatron_vita.checkpoint.metadata import StoredPiece, StoredTensor, metadata_bytes, parse_metadata
from megatron_vita.checkpoint.storage import METADATA_FILE
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.errors import CheckpointError
from tests.checkpoint.tiny import stage, state

THREADS, READS = 8, 150
TENSORS = {
    "a": torch.arange(37 * 11, dtype=torch.float32).reshape(37, 11),
    "b": torch.arange(1000, 1000 + 2 * 50, dtype=torch.bfloat16).reshape(1, 50, 2),
    "c": torch.arange(64, dtype=torch.int64) - 7,
    "scalar": torch.tensor(5.0),
    "empty": torch.empty(0, 3),
}
POISON = 0xEE
"""What memory that was given back is overwritten with, for whoever still looks into it to see."""


class PoisonedBuffers(streams.Buffers):
    """Memory that shows whether it was given back too early, twice, or borrowed by two at once."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.out: dict[int, streams.Bytes] = {}
        self.reused = 0

    def take(self, size: int) -> streams.Bytes:
        taken = super().take(size)
        assert id(taken) not in self.out
        self.reused += bool(taken.size and taken[0] == POISON)
        self.out[id(taken)] = taken
        return taken

    def give(self, buffer: streams.Bytes) -> None:
        assert self.out.pop(id(buffer), None) is buffer, "given back twice"
        buffer[...] = POISON
        super().give(buffer)


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointTensors]:
    """A checkpoint of many pieces, of which few find room; threads take turns as often as can be."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 130)
    folder = checkpoint.write_tensors(tmp_path, 1, TENSORS, state(stage()))
    monkeypatch.setattr(streams, "BLOCK_BYTES", 512)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 512)
    monkeypatch.setattr(stored, "Buffers", PoisonedBuffers)
    monkeypatch.setattr(stored, "_CACHE_BYTES", 6000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield CheckpointTensors(folder)
    sys.setswitchinterval(interval)


def read_at_random(tensors: CheckpointTensors, seed: int, outcomes: list[str]) -> None:
    chance = random.Random(seed)
    for _ in range(READS):
        name = chance.choice(list(TENSORS))
        expected = bits_of(TENSORS[name])
        slices = tuple(
            slice(*sorted(chance.sample(range(size + 1), 2))) if size else slice(0, 0) for size in expected.shape
        )
        if chance.random() < 0.2:
            slices = whole(expected.shape)
        try:
            if chance.random() < 0.5:
                found, right = tensors.bits(name, slices), slice_of(expected, slices)
                outcomes.append("read" if np.array_equal(found, right) else f"{name} {slices}: {found}, not {right}")
            else:
                outcomes.append(_borrow_and_compare(tensors, name, slices, slice_of(expected, slices), chance))
        except CheckpointError:
            outcomes.append("failed")
        except BaseException as error:
            outcomes.append(repr(error))


def _borrow_and_compare(
    tensors: CheckpointTensors, name: str, slices: Slices, right: Bits, chance: random.Random
) -> str:
    """Looks at a view again after others were read, which pushes its piece out of memory."""
    view = tensors.borrow(name, slices)
    try:
        assert view.bits.flags.c_contiguous
        for _ in range(chance.randrange(3)):
            tensors.bits("a", (slice(0, 37), slice(chance.randrange(5), 11)))
        return "borrowed" if np.array_equal(view.bits, right) else f"{name} {slices}: {view.bits} borrowed, not {right}"
    finally:
        view.release()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0.0, 0.02])
def test_threads_never_see_another_pieces_bytes(
    tensors: CheckpointTensors, failing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, read = random.Random(1), stored.read_exactly

    def sometimes(*arguments: object) -> None:
        read(*arguments)  # type: ignore[arg-type]
        if chance.random() < failing:
            raise CheckpointError("a disk that fails now and then")

    monkeypatch.setattr(stored, "read_exactly", sometimes)
    outcomes: list[str] = []
    threads = [
        threading.Thread(target=read_at_random, args=(tensors, seed, outcomes), daemon=True) for seed in range(THREADS)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
        assert not one.is_alive(), "a thread waits for a piece that nobody reads"
    assert len(outcomes) == THREADS * READS
    assert set(outcomes) <= {"read", "borrowed"} | ({"failed"} if failing else set())
    assert outcomes.count("read") > READS
    assert outcomes.count("borrowed") > READS
    buffers, kept = tensors._buffers, tensors._cache.values()
    assert isinstance(buffers, PoisonedBuffers)
    assert buffers.reused > READS, "nothing was given back"
    assert not any(one.users for one in kept)
    assert sum(stored.length for _, stored in tensors._cache) <= tensors._limit
    if not failing:  # what nobody keeps or looks into has been given back
        assert buffers.out.keys() == {id(one.content.result()[0]) for one in kept}
    monkeypatch.setattr(stored, "read_exactly", read)
    for name, one in TENSORS.items():  # a failure is forgotten
        assert torch.equal(tensors[name], one)


def test_threads_that_write_do_not_share_memory(
    tensors: CheckpointTensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of pieces pass through memory that is used again and again."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 60)
    monkeypatch.setattr(streaming, "Buffers", PoisonedBuffers)
    for attempt in range(5):
        folder = checkpoint.write_tensors(tmp_path / str(attempt), 1, tensors, state(stage()), workers=THREADS)
        again = CheckpointTensors(folder)
        again.integrity.check_all()
        for name, one in TENSORS.items():
            assert np.array_equal(again.bits(name), bits_of(one))


def test_what_was_used_last_is_kept(tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pieces two have room: the one that was asked for again stays, the other goes."""
    rows = [(slice(row, row + 1), slice(0, 11)) for row in (0, 10, 20)]
    tensors.bits("a", rows[0])
    length = max(stored.length for _, stored in tensors._cache)
    tensors._limit = 2 * length + length // 2
    for row in (1, 0, 2):
        tensors.bits("a", rows[row])
    reads = []
    read = tensors._read_piece

    def counted(name: str, stored: StoredPiece) -> object:
        reads.append(stored.offsets[0])
        return read(name, stored)

    monkeypatch.setattr(tensors, "_read_piece", counted)
    tensors.bits("a", rows[0])
    tensors.bits("a", rows[2])
    assert reads == []
    tensors.bits("a", rows[1])
    assert len(reads) == 1


def test_a_failure_reaches_all_who_wait_and_the_next_who_asks_tries_again(
    tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read, calls = threading.Event(), stored.read_exactly, []

    def late(*arguments: object) -> None:
        calls.append(arguments)
        assert asked.wait(60)
        raise CheckpointError("a disk that fails")

    def ask(outcomes: list[str]) -> None:
        try:
            tensors.bits("scalar")
        except CheckpointError as error:
            outcomes.append(str(error))

    monkeypatch.setattr(stored, "read_exactly", late)
    outcomes: list[str] = []
    threads = [threading.Thread(target=ask, args=(outcomes,), daemon=True) for _ in range(3)]
    for one in threads:
        one.start()
    while not tensors._cache or next(iter(tensors._cache.values())).users < 3:
        assert any(one.is_alive() for one in threads)
    asked.set()
    for one in threads:
        one.join(20)
    assert outcomes == ["a disk that fails"] * 3
    assert len(calls) == 1, "each read it for itself"
    monkeypatch.setattr(stored, "read_exactly", read)
    assert tensors["scalar"].item() == 5


def test_a_failure_does_not_drop_the_piece_that_another_thread_has_read_since(
    tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reader fails only after its piece was pushed out of memory and read by the second."""
    read, nested = stored.read_exactly, []

    def fails_late(*arguments: object) -> None:
        monkeypatch.setattr(stored, "read_exactly", read)
        nested.extend(tensors[name] for name in ("a", "scalar"))
        raise CheckpointError("a disk that fails")

    monkeypatch.setattr(stored, "read_exactly", fails_late)
    tensors._limit = 1
    with pytest.raises(CheckpointError, match="a disk that fails"):
        tensors.bits("scalar")
    assert nested[-1].item() == 5
    assert "scalar" in [name for name, _ in tensors._cache]
    assert all(one.kept and not one.users for one in tensors._cache.values())


def _described(tensors: CheckpointTensors, **lies: StoredTensor) -> CheckpointTensors:
    """The same checkpoint with further tensors in its `.metadata`, and digests that are right."""
    folder = tensors.folder
    described = parse_metadata((folder / METADATA_FILE).read_bytes(), folder / METADATA_FILE)
    (folder / METADATA_FILE).write_bytes(metadata_bytes({**described, **lies}))
    entries = tensors.integrity.files.items()
    pieces = {name: [(length, digest) for length, digest in one["pieces"]] for name, one in entries if "pieces" in one}
    (folder / INTEGRITY_FILE).unlink()
    write_integrity(folder, pieces)
    return CheckpointTensors(folder)


def test_a_tensor_that_claims_the_piece_of_another_is_checked_for_itself(tensors: CheckpointTensors) -> None:
    (piece,) = tensors._tensors["scalar"].pieces
    integers = by_name("int32")
    assert integers is not None
    lies = {
        "of_another_type": StoredTensor((), integers, (piece,)),
        "of_another_shape": StoredTensor((1,), FLOAT32, (dataclasses.replace(piece, offsets=(0,), sizes=(1,)),)),
    }
    again = _described(tensors, **lies)
    assert again["scalar"].item() == 5  # what was read for this one is not handed out for the others
    for name in lies:
        with pytest.raises(CheckpointError, match=f"the part for {name} has another shape or type than promised"):
            again.bits(name)


def test_a_piece_that_is_none_is_refused_before_memory_is_taken_for_it(tensors: CheckpointTensors) -> None:
    (piece,) = tensors._tensors["scalar"].pieces
    huge, elsewhere = dataclasses.replace(piece, length=1 << 60), dataclasses.replace(piece, file="run.json")
    lies = {"huge": StoredTensor((), FLOAT32, (huge,)), "elsewhere": StoredTensor((), FLOAT32, (elsewhere,))}
    again = _described(tensors, **lies)
    for name in lies:
        with pytest.raises(CheckpointError, match=f"the part that holds {name} has changed"):
            again.bits(name)
    missing = {"missing": StoredTensor((), FLOAT32, (dataclasses.replace(piece, file="missing"),))}
    with pytest.raises(CheckpointError, match="missing is said to lie in 'missing', no part of it"):
        _described(tensors, **missing).bits("missing")
