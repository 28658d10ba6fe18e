"""Pickles as data: what the machine reads is what Python pickles, what is written is what Python would write."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.checkpoint.pickle_writer import dumps
from megatron_vita.checkpoint.pickles import Name, Persistent, Record, run
from megatron_vita.errors import CheckpointError

WHERE = Path("some/file")
_ATOMS = (
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats(allow_nan=False) | st.text(max_size=20)
)
_VALUES = st.recursive(
    _ATOMS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=5)
    ),
    max_leaves=30,
)


@pytest.mark.slow
@given(value=_VALUES, protocol=st.sampled_from([1, 2, 3, 4, 5]))
def test_plain_values_are_read_as_python_pickles_them(value: Any, protocol: int) -> None:
    assert _typed(run(pickle.dumps(value, protocol), WHERE)) == _typed(value)


@given(value=_VALUES)
def test_plain_values_come_back_from_what_is_written(value: Any) -> None:
    assert _typed(pickle.loads(dumps(value))) == _typed(value)
    assert _typed(run(dumps(value), WHERE)) == _typed(value)


def _typed(value: Any) -> Any:
    """With types, as 1 == True == 1.0."""
    if isinstance(value, dict):
        return [(_typed(key), _typed(one)) for key, one in value.items()]
    return (type(value), [_typed(one) for one in value] if isinstance(value, list | tuple) else value)


@pytest.mark.parametrize("number", [0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, -1, -(1 << 31), 1 << 5000])
def test_the_bytes_are_those_of_python(number: int) -> None:
    value = ("a text", [number, "a text", ()], {"key": 1.5, "other": None}, (1, 2, True, {}))
    assert dumps(value) == pickle.dumps(value, protocol=2)


def test_many_objects_take_wide_numbers() -> None:
    value = [str(one) for one in range(400)] * 2  # Python writes lists in batches of 1000
    assert dumps(value) == pickle.dumps(value, protocol=2)
    assert run(dumps(value), WHERE) == value


def test_records_are_made_by_stock_pickle() -> None:
    value = Record(Name("argparse", "Namespace"), (), {"path": Record(Name("pathlib", "PurePosixPath"), ("a", "b"))})
    key = Record(Name("pathlib", "PurePosixPath"), ("k",))
    loaded = pickle.loads(dumps([value, {key: Name("collections", "OrderedDict")}]))
    assert loaded == [argparse.Namespace(path=PurePosixPath("a/b")), {PurePosixPath("k"): OrderedDict}]


def test_a_record_is_read_as_it_was_written() -> None:
    call = Name("no.such.module", "Class")
    value, mapping, lone = run(
        dumps([Record(call, (1, "x"), {"a": 2}), {Record(call, ()): 5}, Record(call, ())]), WHERE
    )
    assert (value.call, value.arguments, value.state) == (call, (1, "x"), {"a": 2})
    ((key, held),) = mapping.items()
    assert (key.call, key.arguments, held) == (call, (), 5)
    assert lone.state is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_become_records(protocol: int) -> None:
    read = run(pickle.dumps(argparse.Namespace(a=[1], b=frozenset({2})), protocol), WHERE)
    assert (read.call, read.arguments) == (Name("argparse", "Namespace"), ())
    assert read.state["a"] == [1]


def test_what_lies_outside_goes_through_the_hook() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("place", 7) if value is Ellipsis else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump([..., 1])
    assert dumps([Persistent(("place", 7)), 1]) == stream.getvalue()
    assert run(stream.getvalue(), WHERE, persistent=lambda identity: identity[1]) == [7, 1]
    assert run(stream.getvalue(), WHERE)[0].identity == ("place", 7)


def test_calls_and_names_go_through_their_hooks() -> None:
    said: list[Name] = []
    program = pickle.dumps({"kept": PurePosixPath("x"), "made": OrderedDict(a=1)}, protocol=4)
    path = Name(PurePosixPath.__module__, "PurePosixPath")
    called = run(program, WHERE, calls=lambda name, arguments: (name, arguments), names=said.append)
    assert called == {"kept": (path, ("x",)), "made": {"a": 1}}
    assert said == [path, Name("collections", "OrderedDict")]


def test_a_name_that_is_only_said_is_seen() -> None:
    def refuse(name: Name) -> None:
        raise CheckpointError(f"not {name}")

    with pytest.raises(CheckpointError, match=r"not os\.system"):
        run(b"cos\nsystem\n0N.", WHERE, names=refuse)


def test_keys_whose_hash_is_work_are_not_hashed() -> None:
    clashing = [one * ((1 << 61) - 1) << 20 for one in range(1, 50)]
    assert len({hash(one) for one in clashing}) == 1
    read = run(pickle.dumps(dict.fromkeys([*clashing, (1, (2,)), 3, "x"])), WHERE)
    assert [key for key in read if type(key) is not Record] == [3, "x"]
    assert [key.arguments for key in read if type(key) is Record] == [*clashing, (1, (2,))]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.", "damaged"),
        (b"NN.", "damaged"),
        (b"K.", "damaged"),
        (b"J\x00\x00.", "damaged"),
        (b"\x8c\x05ab.", "damaged"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.", "damaged"),
        (b"cos\nsystem", "damaged"),
        (b"NN\x93.", "damaged"),
        (b"}Ns.", "damaged"),
        (b"}(Nu.", "damaged"),
        (b"t.", "damaged"),
        (b"P1\n.", "instruction 0x50"),
        (b"\x97.", "instruction 0x97"),
        (b"N0" * 50 + b"N.", "more than 50 instructions"),
    ],
)
def test_what_makes_no_sense_is_refused(program: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^some/file: refused, .*{message}"):
        run(program, WHERE, max_steps=50)


def test_what_cannot_be_written_is_an_error() -> None:
    for one in (b"bytes", {1, 2}, object()):
        with pytest.raises(TypeError, match="is not written"):
            dumps([one])
