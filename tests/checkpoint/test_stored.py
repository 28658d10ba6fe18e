"""Many threads that read a checkpoint through a cache too small for it: every byte is the right one."""

from __future__ import annotations

import dataclasses
import io
import random
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.checkpoint import planner, stored
from megatron_vita.checkpoint.boxes import Slices, whole
from megatron_vita.checkpoint.metadata import StoredPiece, StoredTensor
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.tensors import slice_of
from megatron_vita.errors import CheckpointError
from megatron_vita.files import new_digest
from tests.checkpoint.tiny import stage, state

THREADS, READS = 8, 100
TENSORS = {
    "a": torch.arange(37 * 11, dtype=torch.float32).reshape(37, 11),
    "b": torch.arange(1000, 1000 + 2 * 50, dtype=torch.bfloat16).reshape(1, 50, 2),
    "c": torch.arange(64, dtype=torch.int64) - 7,
    "scalar": torch.tensor(5.0),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointTensors]:
    """A checkpoint of many pieces, of which few find room; threads take turns as often as can be."""
    monkeypatch.setattr(planner, "PIECE_BYTES", 130)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 512)
    monkeypatch.setattr(stored, "_CACHE_BYTES", 500)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield CheckpointTensors(checkpoint.write_tensors(tmp_path, 1, TENSORS, state(stage())))
    sys.setswitchinterval(interval)


def any_box(name: str, chance: random.Random) -> Slices:
    shape = TENSORS[name].shape
    if chance.random() < 0.2:
        return whole(shape)
    return tuple(slice(*sorted(chance.sample(range(size + 1), 2))) if size else slice(0, 0) for size in shape)


def read_at_random(tensors: CheckpointTensors, seed: int, outcomes: list[str]) -> None:
    chance = random.Random(seed)
    for _ in range(READS):
        name = chance.choice(list(TENSORS))
        box = any_box(name, chance)
        right = slice_of(TENSORS[name], box)
        try:
            if chance.random() < 0.5:
                found = tensors.read(name, box)
            else:  # into something that lies the other way round
                memory = torch.zeros(2, *right.shape[::-1], dtype=right.dtype)
                found = memory[1].permute(tuple(reversed(range(right.dim()))))
                tensors.read_into(name, box, found)
                assert not memory[0].any()
            outcomes.append("read" if torch.equal(found, right) else f"{name} {box}: {found}, not {right}")
        except CheckpointError:
            outcomes.append("failed")
        except BaseException as error:
            outcomes.append(repr(error))


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
        one.join(60)
        assert not one.is_alive(), "a thread waits for a piece that nobody reads"
    assert len(outcomes) == THREADS * READS
    assert set(outcomes) <= {"read"} | ({"failed"} if failing else set())
    assert outcomes.count("read") > READS
    kept = [one.result().nbytes for one in tensors._cache.values()]
    assert sum(kept) <= tensors._limit
    monkeypatch.setattr(stored, "read_exactly", read)
    for name, one in TENSORS.items():  # a failure is forgotten
        assert torch.equal(tensors[name], one)


def counted(tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read from the disk from now on: (tensor, first row)."""
    reads: list[tuple[str, int]] = []
    read = tensors.read_piece

    def act(name: str, piece: StoredPiece) -> torch.Tensor:
        reads.append((name, piece.box[0].start if piece.box else 0))
        return read(name, piece)

    monkeypatch.setattr(tensors, "read_piece", act)
    return reads


def test_what_was_used_last_is_kept(tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pieces two have room: the one that was asked for again stays, the other goes."""
    monkeypatch.setattr(tensors, "_make_room", lambda name: None)
    tensors._limit = 250
    rows = [(slice(row, row + 1), slice(0, 11)) for row in (0, 10, 20)]
    reads = counted(tensors, monkeypatch)
    for row in (0, 1, 0, 2, 0, 2):
        tensors.read("a", rows[row])
    assert reads == [("a", 0), ("a", 10), ("a", 20)]
    tensors.read("a", rows[1])
    assert reads[3:] == [("a", 10)]


def test_two_rows_of_pieces_have_room_however_many_ranks_cut_the_columns(
    tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads row after row of a tensor reads each piece once, although many lie side by side."""
    reads = counted(tensors, monkeypatch)
    for row in range(37):
        tensors.read("a", (slice(row, row + 1), slice(0, 11)))
    assert len(reads) == len(set(reads)) == len(tensors.stored["a"].pieces) > 10


def test_a_failure_reaches_all_who_wait_and_the_next_who_asks_tries_again(
    tensors: CheckpointTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read, calls, waiting = threading.Event(), stored.read_exactly, [], []
    result = stored.Future.result

    def late(*arguments: object) -> None:
        calls.append(arguments)
        assert asked.wait(60)
        raise CheckpointError("a disk that fails")

    def wait(future: stored.Future[torch.Tensor]) -> torch.Tensor:
        waiting.append(future)
        if len(waiting) == 2:
            asked.set()
        return result(future)

    def ask(outcomes: list[str]) -> None:
        try:
            tensors.read("scalar")
        except CheckpointError as error:
            outcomes.append(str(error))

    monkeypatch.setattr(stored, "read_exactly", late)
    monkeypatch.setattr(stored.Future, "result", wait)
    outcomes: list[str] = []
    threads = [threading.Thread(target=ask, args=(outcomes,), daemon=True) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert outcomes == ["a disk that fails"] * 3
    assert len(calls) == 1, "each read it for itself"
    assert not tensors._cache
    monkeypatch.setattr(stored, "read_exactly", read)
    assert tensors["scalar"].item() == 5


def test_a_tensor_that_claims_the_piece_of_another_is_checked_for_itself(tensors: CheckpointTensors) -> None:
    (piece,) = tensors.stored["scalar"].pieces
    tensors.stored["of_another_type"] = StoredTensor((), torch.float64, (piece,))
    more = dataclasses.replace(piece, box=(slice(0, 2),))
    tensors.stored["of_another_shape"] = StoredTensor((2,), torch.float32, (more,))
    tensors.stored["of_the_same_size"] = StoredTensor((), torch.int32, (piece,))
    assert tensors["scalar"].item() == 5  # what was read for this one is not handed out for the others
    for name in ("of_another_type", "of_another_shape"):
        with pytest.raises(CheckpointError, match=f"the part for {name} has another shape or type than promised"):
            tensors.read(name)
    assert tensors["of_the_same_size"].dtype == torch.int32  # the bits are verified, what they mean says `.metadata`


@pytest.mark.parametrize("change", [{"length": 1 << 60}, {"file": "run.json"}, {"file": "missing"}, {"position": 1}])
def test_a_piece_that_is_none_is_refused_before_memory_is_taken_for_it(
    tensors: CheckpointTensors, change: dict[str, object]
) -> None:
    (piece,) = tensors.stored["scalar"].pieces
    tensors.stored["lie"] = StoredTensor((), torch.float32, (dataclasses.replace(piece, **change),))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the part that holds lie has changed"):
        tensors.read("lie")


def _as_other(content: bytes, how: str) -> bytes:
    """What torch.save wrote, as another writer (or an enemy) would have made it."""
    if how == "no archive":
        return b"x" * len(content)
    if how == "nothing":
        return b""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(sink, "w") as new:
        for name in old.namelist():
            if how != "no record" or not name.endswith("data/0"):
                kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
                new.writestr(name, old.read(name), kind)
    made = sink.getvalue()
    return made[:-30] if how == "cut" else made


@pytest.mark.parametrize("how", ["unaligned", "compressed", "no record", "no archive", "nothing", "cut"])
def test_elements_are_taken_only_from_where_torch_puts_them(
    tensors: CheckpointTensors, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (piece,) = tensors.stored["scalar"].pieces
    path = tensors.folder / piece.file
    content = _as_other(path.read_bytes()[piece.position : piece.position + piece.length], how)
    path.write_bytes(content)
    digest = new_digest()
    digest.update(content)
    tensors.integrity._pieces[piece.file, 0] = (len(content), digest.hexdigest())
    other = dataclasses.replace(piece, position=0, length=len(content))
    tensors.stored["scalar"] = StoredTensor((), torch.float32, (other,))
    if how == "unaligned":
        assert tensors["scalar"].item() == 5
        return
    with pytest.raises(CheckpointError, match="the part for scalar has another shape or type than promised"):
        tensors.read("scalar")
