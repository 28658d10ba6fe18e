"""`.metadata`, read with distrust: what torch writes is read, nothing of it is run, and nonsense is refused."""

from __future__ import annotations

import pickle
import subprocess
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

from megatron_vita.checkpoint.boxes import extent, slices_at, whole
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.metadata import DTYPES, StoredPiece, StoredTensor, parse_metadata
from megatron_vita.checkpoint.stored import CheckpointTensors
from megatron_vita.checkpoint.streams import digest_of
from megatron_vita.errors import CheckpointError

WHERE = Path("folder/.metadata")
TENSORS = {
    "language_model.w": StoredTensor(
        (4, 3),
        torch.bfloat16,
        (
            StoredPiece(slices_at((0, 0), (1, 3)), "__0_0.distcp", 0, 1000),
            StoredPiece(slices_at((1, 0), (3, 3)), "__0_1.distcp", 1 << 40, 70_000),
        ),
    ),
    **{
        f"of {name}": StoredTensor((2,), one, (StoredPiece(whole((2,)), "x", 1000, 9),)) for name, one in DTYPES.items()
    },
    "scalar": StoredTensor((), torch.float32, (StoredPiece((), "__0_0.distcp", 5, 6),)),
    "empty": StoredTensor((0, 3), torch.float32, (StoredPiece(whole((0, 3)), "__0_0.distcp", 7, 8),)),
}


def stock(tensors: dict[str, StoredTensor]) -> Metadata:
    """The same, built from torch's own classes."""
    described: dict[str, Any] = {}
    places = {}
    for key, one in tensors.items():
        corners = [torch.Size(axis.start for axis in part.box) for part in one.pieces]
        described[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=one.dtype),
            size=torch.Size(one.shape),
            chunks=[
                ChunkStorageMetadata(at, torch.Size(extent(part.box)))
                for at, part in zip(corners, one.pieces, strict=True)
            ],
        )
        for index, (at, part) in enumerate(zip(corners, one.pieces, strict=True)):
            places[MetadataIndex(key, at, index)] = _StorageInfo(part.file, part.position, part.length)
    return Metadata(state_dict_metadata=described, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_describes_is_read(protocol: int) -> None:
    assert parse_metadata(pickle.dumps(stock(TENSORS), protocol), WHERE) == TENSORS


def test_a_checkpoint_that_torch_wrote_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(7)}
    content = {**tensors, "nested": {"step": 3, "path": Path("x")}}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    places = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    lengths: dict[str, list[tuple[int, str]]] = {}
    for one in sorted(places, key=lambda place: place.offset):
        digest = digest_of(tmp_path / one.relative_path, one.offset, one.length)
        lengths.setdefault(one.relative_path, []).append((one.length, digest))
    write_integrity(tmp_path, lengths)
    read = CheckpointTensors(tmp_path)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


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
_HUGE = ChunkStorageMetadata(torch.Size((0, 0)), (1 << 62, 1 << 62))  # type: ignore[arg-type]
_INFO = _StorageInfo("f", 0, 10)
_OVERLAPPING = StoredTensor(
    (3, 3),
    torch.float32,
    tuple(
        StoredPiece(
            slices_at(offsets, sizes), "f", 9 * index, 9
        )  # nine elements in all, of which the one in the middle twice
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
    "parts that overlap": (pickle.dumps(stock({"a": _OVERLAPPING})), "do not hold each of its elements once"),
    "part outside": (_with(shape=torch.Size((1, 4))), "a part of a leaves it"),
    "part of another shape": (_with(shape=torch.Size((4,))), "a part of a leaves it"),
    "parts that are none": (_with(chunks={}), "has no parts"),
    "part that is none": (_with(chunks=[3]), "in the place of ChunkStorageMetadata"),
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
