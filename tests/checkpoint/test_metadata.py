"""`.metadata` without torch: what is written is torch's own object, what torch writes is read, nonsense is refused."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_vita.checkpoint import archive
from megatron_vita.checkpoint import metadata as module
from megatron_vita.checkpoint.dtypes import BFLOAT16, DTYPES, FLOAT32, bits_of, dtype_of, torch_dtype
from megatron_vita.checkpoint.metadata import StoredPiece, StoredTensor, metadata_bytes, parse_metadata
from megatron_vita.errors import CheckpointError

WHERE = Path("folder/.metadata")
TENSORS = {
    "language_model.w": StoredTensor(
        (4, 3),
        BFLOAT16,
        (
            StoredPiece((0, 0), (1, 3), "__0_0.distcp", 0, 1000),
            StoredPiece((1, 0), (3, 3), "__0_1.distcp", 1 << 40, 70_000),
        ),
    ),
    **{f"of {one}": StoredTensor((2,), one, (StoredPiece((0,), (2,), "x", 1000, 9),)) for one in DTYPES},
    "scalar": StoredTensor((), FLOAT32, (StoredPiece((), (), "__0_0.distcp", 5, 6),)),
    "empty": StoredTensor((0, 3), FLOAT32, (StoredPiece((0, 0), (0, 3), "__0_0.distcp", 7, 8),)),
}


def stock(tensors: dict[str, StoredTensor]) -> Metadata:
    """The same, built from torch's own classes."""
    described: dict[str, Any] = {}
    places = {}
    for key, one in tensors.items():
        described[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=torch_dtype(one.dtype)),
            size=torch.Size(one.shape),
            chunks=[ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in one.pieces],
        )
        for index, part in enumerate(one.pieces):
            places[MetadataIndex(key, part.offsets, index)] = _StorageInfo(part.file, part.position, part.length)
    return Metadata(state_dict_metadata=described, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")


def fields(value: Any) -> Any:
    """Types and attributes of everything in it: comparison leaves out some, such as the hint of an index."""
    if dataclasses.is_dataclass(value):
        return type(value), {one.name: fields(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return [(fields(key), fields(one)) for key, one in value.items()]
    return type(value), [fields(one) for one in value] if isinstance(value, list | tuple) else value


def test_what_is_written_is_torchs_own_object() -> None:
    loaded = pickle.loads(metadata_bytes(TENSORS))
    assert loaded == stock(TENSORS)
    assert fields(loaded) == fields(stock(TENSORS))
    first, second = (loaded.state_dict_metadata[key].properties for key in ("scalar", "empty"))
    assert first is not second  # what torch may change is shared by none


def test_the_bytes_do_not_depend_on_the_process() -> None:
    assert metadata_bytes(TENSORS) == metadata_bytes(dict(TENSORS))
    assert list(parse_metadata(metadata_bytes(TENSORS), WHERE)) == list(TENSORS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_both_ways_of_writing_are_read(protocol: int) -> None:
    assert parse_metadata(metadata_bytes(TENSORS), WHERE) == TENSORS
    assert parse_metadata(pickle.dumps(stock(TENSORS), protocol), WHERE) == TENSORS


def test_a_checkpoint_that_torch_wrote_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(7)}
    content = {**tensors, "nested": {"step": 3, "path": Path("x")}}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    read = parse_metadata((tmp_path / ".metadata").read_bytes(), WHERE)
    assert set(read) == set(tensors)
    for key, tensor in tensors.items():
        (piece,) = read[key].pieces
        assert (read[key].shape, read[key].dtype) == (tuple(tensor.shape), dtype_of(tensor))
        part = memoryview((tmp_path / piece.file).read_bytes())[piece.position : piece.position + piece.length]
        start, shape, dtype = archive.tensor_in(part, WHERE)
        assert (shape, dtype) == (piece.sizes, read[key].dtype)
        assert bytes(part[start : start + tensor.nbytes]) == bits_of(tensor).tobytes()


def test_torch_reads_a_checkpoint_that_was_written_without_it(tmp_path: Path) -> None:
    tensor, scalar = torch.randn(5, 3), torch.tensor(2.5, dtype=torch.bfloat16)
    stored: dict[str, StoredTensor] = {}
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for key, whole, cuts in (("t", tensor, (0, 2, 5)), ("s", scalar, ())):
            rows = [(whole[first:last], (first, 0)) for first, last in itertools.pairwise(cuts)]
            pieces = []
            for part, offsets in rows or [(whole, ())]:
                head, tail = archive.frame(tuple(part.shape), dtype_of(part))
                content = head + bits_of(part).tobytes() + tail
                pieces.append(StoredPiece(offsets, tuple(part.shape), "__0_0.distcp", file.tell(), len(content)))
                file.write(content)
            stored[key] = StoredTensor(tuple(whole.shape), dtype_of(whole), tuple(pieces))
    (tmp_path / ".metadata").write_bytes(metadata_bytes(stored))
    loaded = {"t": torch.zeros(5, 3), "s": torch.zeros((), dtype=torch.bfloat16)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(loaded["t"], tensor)
    assert torch.equal(loaded["s"], scalar)


def test_what_is_no_tensor_is_left_out() -> None:
    metadata = stock(TENSORS)
    metadata.state_dict_metadata["rng"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("rng")] = _StorageInfo("__0_0.distcp", 3, 4)
    metadata.planner_data = {"rng": ("rng", 0)}
    metadata.storage_meta = StorageMeta(checkpoint_id=Path("/some/where"), save_id="7", modules=["m"])
    assert parse_metadata(pickle.dumps(metadata), WHERE) == TENSORS


def test_the_plans_that_megatron_core_adds_are_left_out() -> None:
    metadata, index = stock(TENSORS), MetadataIndex("scalar", ())
    chunk = ChunkStorageMetadata(torch.Size(()), torch.Size(()))
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size(()))
    item = WriteItem(index, WriteItemType.TENSOR, BytesIOWriteData(3), data)
    metadata.all_local_plans = [SavePlan([item])]  # type: ignore[attr-defined]
    assert parse_metadata(pickle.dumps(metadata), WHERE) == TENSORS


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def _with(**changes: Any) -> bytes:
    """A file of one tensor of which something is different."""
    whole: dict[str, Any] = {
        "key": "a",
        "shape": torch.Size((2, 2)),
        "properties": TensorProperties(dtype=torch.float32),
        "chunks": [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 2)))],
        "places": {MetadataIndex("a", (0, 0)): _StorageInfo("f", 0, 10)},
        "rest": {},
    } | changes
    described = TensorStorageMetadata(whole["properties"], whole["shape"], whole["chunks"])
    return pickle.dumps(Metadata({whole["key"]: described}, storage_data=whole["places"], **whole["rest"]))


def _place(*values: Any, index: tuple[Any, ...] = ("a", (0, 0))) -> dict[Any, Any]:
    return {MetadataIndex(*index): _StorageInfo(*values)}


class _Index(MetadataIndex):
    """Told apart by its identity, so that one dictionary can hold it twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __reduce__(self) -> Any:
        return (MetadataIndex, ("a", (0, 0)))


_HALF = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1, 2)))
_FULL = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 2)))
vars(_FULL).update({f"field {one}": one for one in range(50)})  # shared by many parts, they would be copied for each
_HUGE = ChunkStorageMetadata(torch.Size((0, 0)), (1 << 62, 1 << 62))  # type: ignore[arg-type]
_INFO = _StorageInfo("f", 0, 10)
_OVERLAPPING = StoredTensor(
    (3, 3),
    FLOAT32,
    tuple(
        StoredPiece(offsets, sizes, "f", 9 * index, 9)  # nine elements in all, of which the one in the middle twice
        for index, (offsets, sizes) in enumerate([((0, 0), (2, 2)), ((1, 1), (2, 2)), ((2, 0), (1, 1))])
    ),
)
REFUSED: dict[str, tuple[bytes, str]] = {
    "a call": (pickle.dumps(_Call(print, "x")), r"it names builtins\.print, which a checkpoint has no business with"),
    "a call inside": (_with(rest={"planner_data": _Call(eval, "1")}), r"names builtins\.eval"),
    "a name": (_with(rest={"planner_data": subprocess.run}), r"names subprocess\.run"),
    "another of torch": (_with(rest={"planner_data": torch.nn.Linear}), r"names torch\.nn\.modules\.linear\.Linear"),
    "a type": (_with(properties=TensorProperties(dtype=torch.complex64)), r"names torch\.complex64"),
    "no type": (_with(properties=TensorProperties(dtype=3)), "no type"),  # type: ignore[arg-type]
    "damaged": (_with()[:-20], "damaged"),
    "nothing": (b"", "damaged"),
    "another object": (pickle.dumps({"a": 1}), "in the place of Metadata"),
    "no tensors": (pickle.dumps(Metadata(None)), "does not describe a checkpoint"),  # type: ignore[arg-type]
    "no places": (_with(places=None), "does not describe a checkpoint"),
    "a name that is none": (_with(key=3), "name is no text"),
    "negative length": (_with(places=_place("f", 0, -1)), "no natural number"),
    "negative position": (_with(places=_place("f", -1, 1)), "no natural number"),
    "true length": (_with(places=_place("f", 0, True)), "no natural number"),
    "long length": (_with(places=_place("f", 0, 1 << 63)), "no natural number"),
    "negative size": (_with(shape=(-2, -2)), "no natural number"),
    "text size": (_with(shape=("2", 2)), "no natural number"),
    "size that is none": (_with(shape=4), "no list of numbers"),
    "many dimensions": (_with(shape=(1,) * 65), "no list of numbers"),
    "part without place": (_with(places={}), "lies nowhere"),
    "part elsewhere": (_with(places=_place("f", 0, 10, index=("b", (0, 0)))), "lies nowhere"),
    "part twice": (_with(chunks=[_HALF, _HALF]), "stands there twice"),
    "place twice": (_with(places={_Index("a"): _INFO, _Index("a"): _INFO}), "lies in two places"),
    "half a tensor": (_with(chunks=[_HALF]), "do not hold each of its elements once"),
    "no part": (_with(chunks=[]), "do not hold each of its elements once"),
    "parts that overlap": (metadata_bytes({"a": _OVERLAPPING}), "do not hold each of its elements once"),
    "part outside": (_with(shape=torch.Size((1, 4))), "a part of a leaves it"),
    "part of another shape": (_with(shape=torch.Size((4,))), "a part of a leaves it"),
    "parts that are none": (_with(chunks={}), "has no parts"),
    "part that is none": (_with(chunks=[3]), "in the place of ChunkStorageMetadata"),
    "part of many fields": (_with(chunks=[_FULL]), "fields of ChunkStorageMetadata are not its own"),
    "huge part": (_with(chunks=[_HUGE]), "leaves it"),
    "file elsewhere": (_with(places=_place("../f", 0, 10)), r"a is said to lie in '\.\./f'"),
    "absolute file": (_with(places=_place("/f", 0, 10)), "a is said to lie in '/f'"),
    "no file": (_with(places=_place("", 0, 10)), "a is said to lie in ''"),
    "file that is none": (_with(places=_place(None, 0, 10)), "no name or no file"),
    "compressed": (_with(places=_place("f", 0, 10, ["zstd"])), "which is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=rf"^folder/\.metadata: refused, .*{message}") as caught:
        parse_metadata(content, WHERE)
    assert len(str(caught.value)) < 500


def test_the_unchanged_file_is_read() -> None:
    assert parse_metadata(_with(), WHERE)["a"].shape == (2, 2)


def test_a_file_of_too_many_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 100)
    with pytest.raises(CheckpointError, match="more than 100 instructions"):
        parse_metadata(metadata_bytes(TENSORS), WHERE)


_WITHOUT_TORCH = """
import sys
from pathlib import Path
sys.modules["torch"] = None  # an import of it fails
from megatron_vita.checkpoint import archive, dtypes, metadata
one = metadata.StoredTensor((), dtypes.BFLOAT16, (metadata.StoredPiece((), (), "f", 0, 1),))
assert metadata.parse_metadata(metadata.metadata_bytes({"a": one}), Path("x")) == {"a": one}
head, tail = archive.frame((2,), dtypes.BFLOAT16)
assert archive.tensor_in(memoryview(head + bytes(4) + tail), Path("x")) == (len(head), (2,), dtypes.BFLOAT16)
Path(sys.argv[1]).write_bytes(archive.empty_dict())
assert archive.TorchFile(Path(sys.argv[1])).content == {}
"""


def test_nothing_needs_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(tmp_path / "x.pt")]
    subprocess.run(command, check=True, timeout=60)
