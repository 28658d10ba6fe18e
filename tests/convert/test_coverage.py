"""The account of a conversion finds what views do wrong, whatever the tables of names have proved before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from megatron_vita.checkpoint.boxes import Slices, slices_at, volume
from megatron_vita.checkpoint.tensors import ZEROS, LazyTensors, Origin
from megatron_vita.convert.coverage import account
from megatron_vita.errors import CheckpointError


class Stored(LazyTensors):
    """Two stored tensors of four rows."""

    def shape(self, name: str) -> tuple[int, ...]:
        return {"a": (4, 2), "b": (4, 2)}[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read_into(self, name: str, slices: Slices, out: Tensor) -> None:
        out.zero_()

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


class Made(Stored):
    """Two results, made of given slices."""

    def __init__(self, slices: Mapping[str, list[tuple[str, Slices]]], reasons: Mapping[str, str]) -> None:
        self._source, self._slices, self._reasons = Stored(), slices, reasons

    def origins(self, name: str, slices: Slices) -> Iterator[Origin]:
        for stored, part in self._slices[name]:
            yield Origin(None if stored == ZEROS else self._source, stored, part, volume(part))

    def unused_keys(self) -> Mapping[str, str]:
        return self._reasons


WHOLE, TOP, BOTTOM, MIDDLE = (
    slices_at((0, 0), (4, 2)),
    slices_at((0, 0), (2, 2)),
    slices_at((2, 0), (2, 2)),
    slices_at((1, 0), (2, 2)),
)


def test_what_is_used_once_is_counted() -> None:
    found = account(Made({"a": [("b", TOP), (ZEROS, BOTTOM)], "b": [("a", WHOLE)]}, {"b": "not needed"}))
    assert (found.source_bytes, found.used_bytes, found.target_bytes) == (32, 24, 32)
    assert found.unused_keys == {"b": "4 of 8 elements: not needed"}
    assert found.initialised_keys == {"a": "4 elements: zeros"}
    assert found.parts == {"a": ["b"], "b": ["a"]}
    assert "2 source tensors, 32 bytes: 2 used, 24 bytes" in found.summary()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([("a", WHOLE)], [("a", WHOLE)], "a: elements of it are used twice"),
        ([("a", TOP), ("b", BOTTOM)], [("a", MIDDLE), ("b", TOP)], "a: elements of it are used twice"),
        ([("a", WHOLE)], [("b", TOP), (ZEROS, BOTTOM)], "b: 4 of its 8 elements are used by nothing"),
        ([("a", WHOLE)], [("b", TOP)], "b: 4 of its 8 elements are filled"),
        ([("a", WHOLE)], [("b", WHOLE), (ZEROS, TOP)], "b: 12 of its 8 elements are filled"),
    ],
)
def test_what_is_wrong_is_named(
    first: list[tuple[str, Slices]], second: list[tuple[str, Slices]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^{message}"):
        account(Made({"a": first, "b": second}, {}))
