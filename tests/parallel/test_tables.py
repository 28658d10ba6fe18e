"""Tables of any dtypes come back equal, in one buffer, by one copy; what is no tensor stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.tables import HostTables, gather_tables, map_tensors
from tests.host_data import Copies

CPU, META = torch.device("cpu"), torch.device("meta")
DTYPES = (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)


@dataclass(frozen=True)
class _Table:
    name: str
    layout: SequenceLayout
    parts: tuple[Any, ...]
    index: torch.Tensor | None = None


def _tensors(tables: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(tables, lambda one: found.append(one) or one)  # type: ignore[func-returns-value]
    return found


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    one = torch.randint(0, 100, shape).to(draw(st.sampled_from(DTYPES)))
    return one.t() if one.dim() == 2 and draw(st.booleans()) else one


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(
            _Table, name=st.just("x"), layout=st.just(SequenceLayout((3, 2))), parts=st.tuples(inner, inner),
            index=st.one_of(st.none(), tensors()),
        ),
    )  # fmt: skip


@given(st.recursive(st.one_of(tensors(), st.none(), st.integers()), _nested, max_leaves=8))
def test_tables_come_back_equal_by_one_copy(tables: Any) -> None:
    gathered: HostTables[Any] = gather_tables(tables)
    wanted = _tensors(tables)
    assert len({one.untyped_storage().data_ptr() for one in _tensors(gathered.tables) if one.numel()}) <= 1
    for got in (_tensors(gathered.tables), _tensors(gathered.to(CPU))):
        assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in wanted]
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        assert all(one.is_contiguous() for one in got)
        assert all(one.storage_offset() * one.element_size() % 16 == 0 for one in got if one.numel())
    with Copies() as copies:
        moved = gathered.to(META)
    assert len(copies.to_device) == 1
    assert all(one.is_meta for one in _tensors(moved))
    assert [one.shape for one in _tensors(moved)] == [one.shape for one in wanted]
    # What is between the tensors is the same.
    assert str(map_tensors(moved, lambda _: None)) == str(map_tensors(tables, lambda _: None))  # type: ignore


def test_other_objects_are_not_copied() -> None:
    layout = SequenceLayout((3, 2))
    table = _Table("x", layout, (torch.arange(3), "text"))
    moved = gather_tables(table).to(CPU)
    assert moved.layout == layout
    assert moved.parts[1] is table.parts[1]
    assert tree_leaves(moved.parts)[0].tolist() == [0, 1, 2]
