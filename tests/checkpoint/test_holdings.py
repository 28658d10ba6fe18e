"""Who writes what of weights and optimizer states: every element once, in equal shares, and what each reads back."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.checkpoint.boxes import slices_at
from megatron_vita.checkpoint.holdings import (
    Holding,
    OptimizerState,
    Ranks,
    clear_padding,
    optimizer_parts,
    share,
    weights_to_read,
    weights_to_write,
)
from megatron_vita.checkpoint.parts import Part

CUTS = ("rows", "columns", "gated", "replicated")


@dataclass(frozen=True)
class Group:
    """What is asked of a process group."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def held_by(tensors: dict[str, tuple[str, torch.Tensor]], index: int, count: int) -> list[Holding]:
    """What tensor-parallel rank `index` holds of full tensors, each cut in one way."""
    found: list[Holding] = []
    for key, (cut, tensor) in tensors.items():
        rows, columns = tensor.shape
        if cut == "rows":
            cuts = [(tensor.chunk(count)[index], (rows // count * index, 0))]
        elif cut == "columns":
            cuts = [(tensor.chunk(count, 1)[index], (0, columns // count * index))]
        elif cut == "gated":  # two matrices of one key, which lie in one parameter
            first, second = (half.chunk(count)[index] for half in tensor.chunk(2))
            cuts = [(first, (len(first) * index, 0)), (second, (rows // 2 + len(second) * index, 0))]
        else:
            cuts = [(tensor, (0, 0))]
        parameter = torch.cat([view for view, _ in cuts])
        same = cut == "replicated" or count == 1
        for view, (_, offset) in zip(parameter.chunk(len(cuts)), cuts, strict=True):
            at = view.storage_offset()
            found.append(Holding(key, (rows, columns), offset, view, view[:0], None, parameter, at, False, same))
    return found


def check_cover(parts: Iterable[Part], tensors: dict[str, torch.Tensor]) -> None:
    """Each element of each tensor is in one part, with its value."""
    times = {key: torch.zeros(one.shape, dtype=torch.int64) for key, one in tensors.items()}
    for part in parts:
        assert part.shape == tuple(tensors[part.key].shape)
        assert part.data.numel()
        assert torch.equal(part.data, tensors[part.key][part.box])
        times[part.key][part.box] += 1
    assert all((one == 1).all() for one in times.values())


def any_tensors(seed: int, count: int, number: int) -> dict[str, tuple[str, torch.Tensor]]:
    """Full tensors that `count` tensor-parallel ranks can cut."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for at in range(number):
        cut = CUTS[int(torch.randint(4, (), generator=random))]
        rows, columns = (int(one) for one in torch.randint(1, 5, (2,), generator=random))
        shape = (2 * count * rows, count * columns)
        dtype = (torch.float32, torch.bfloat16)[at % 2]
        found[f"{cut}.{at}"] = (cut, torch.arange(math.prod(shape)).reshape(shape).to(dtype))
    return found


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 12))
def test_shares_follow_each_other_and_differ_by_one_at_most(start: int, size: int, count: int) -> None:
    shares = [share(start, start + size, index, count) for index in range(count)]
    assert [one for pair in shares for one in pair][1:-1:2] == [one for pair in shares for one in pair][2::2]
    assert (shares[0][0], shares[-1][1]) == (start, start + size)
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1


@given(st.data())
def test_a_run_of_a_holding_is_boxes_of_its_tensor(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    whole = torch.arange(math.prod(a + b for a, b in zip(shape, offset, strict=True)))
    whole = whole.reshape([a + b for a, b in zip(shape, offset, strict=True)])
    view = whole[slices_at(offset, shape)].contiguous() if shape else whole.clone()
    one = Holding("k", tuple(whole.shape), offset, view, view[:0] if shape else view, None, view, 0, False, False)
    start = data.draw(st.integers(0, view.numel()))
    stop = data.draw(st.integers(start, view.numel()))
    parts = list(one.parts(start, stop, view.reshape(-1)[start:stop], prefix="p."))
    assert {part.key for part in parts} <= {"p.k"}
    for part in parts:
        assert torch.equal(part.data, whole[part.box] if shape else whole)
    found = [part.data.reshape(-1) for part in parts]
    assert torch.equal(torch.cat(found) if found else view.reshape(-1)[:0], view.reshape(-1)[start:stop])


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_weights_are_dealt_once_over_all_ranks_and_evenly(seed: int, data: int, tensor: int, number: int) -> None:
    cut = any_tensors(seed, tensor, number)
    parts: list[Part] = []
    sizes: Counter[tuple[int, int]] = Counter()
    for at in range(tensor):
        held = held_by(cut, at, tensor)
        for index in range(data):
            own = weights_to_write(held, Ranks(Group(index, data), at, tensor))
            assert len({part.label for part in own}) == len(own)
            parts += own
            sizes[at, index] = sum(part.data.nbytes for part in own)
        for part in weights_to_read(held):
            assert torch.equal(part.data, cut[part.key][1][part.box])
        dealt = [sizes[at, index] for index in range(data)]
        assert max(dealt) - min(dealt) <= 2 * 4, "more than an element at each end"
    check_cover(parts, {key: one for key, (_, one) in cut.items()})
    totals = [sum(sizes[at, index] for index in range(data)) for at in range(tensor)]
    assert max(totals) - min(totals) <= 4 * number


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_optimizer_states_are_written_once_and_read_wherever_they_are(
    seed: int, data: int, tensor: int, number: int
) -> None:
    cut = any_tensors(seed, tensor, number)
    full = {f"optimizer.state.exp_avg.{key}": one.float() for key, (_, one) in cut.items()}
    written: list[Part] = []
    for at in range(tensor):
        held = held_by(cut, at, tensor)
        for index in range(data):
            states = list(states_of(held, index, data))
            own = optimizer_parts(states, held, Ranks(Group(index, data), at, tensor))
            written += [dataclasses.replace(part, data=part.data.clone()) for part in own]
            for part in optimizer_parts(states, held):
                assert torch.equal(part.data, full[part.key][part.box])
                part.data.fill_(-1)  # the optimizer's own memory, all of it
            assert all((one.tensors["exp_avg"] == -1).all() for one in states)
    check_cover(written, full)


def test_what_another_stage_answers_for_is_read_but_not_written() -> None:
    (one,) = held_by({"a": ("replicated", torch.ones(2, 3))}, 0, 1)
    held, ranks = [dataclasses.replace(one, duplicate=True)], Ranks(Group(0, 1), 0, 1)
    states = list(states_of(held, 0, 1))
    assert weights_to_write(held, ranks) == optimizer_parts(states, held, ranks) == []
    assert len(weights_to_read(held)) == len(optimizer_parts(states, held)) == 1


def test_rows_that_pad_a_vocabulary_are_neither_written_nor_read_and_end_as_zeros() -> None:
    parameter = torch.arange(1, 13.0).reshape(4, 3)
    one = Holding("a", (5, 3), (4, 0), parameter[:1], parameter[1:], 8, parameter, 0, False, False)
    states = list(states_of([one], 0, 1))
    for parts in (
        weights_to_write([one], Ranks(Group(0, 1), 1, 2)),
        weights_to_read([one]),
        optimizer_parts(states, [one], Ranks(Group(0, 1), 1, 2)),
        optimizer_parts(states, [one]),
    ):
        assert [(part.box, part.data.tolist()) for part in parts] == [(slices_at((4, 0), (1, 3)), [[1, 2, 3]])]
    clear_padding([one])
    assert parameter.tolist() == [[1, 2, 3]] + 3 * [[0, 0, 0]]


def states_of(held: list[Holding], index: int, count: int) -> Iterable[OptimizerState]:
    """What data-parallel rank `index` holds: its range of all parameters, laid end to end."""
    parameters = list({id(one.parameter): one.parameter for one in held}.values())
    first, last = share(0, sum(one.numel() for one in parameters), index, count)
    at = 0
    for one in parameters:
        start, stop = (min(max(edge - at, 0), one.numel()) for edge in (first, last))
        at += one.numel()
        if start < stop:
            flat = one.reshape(-1)
            tensors = {"exp_avg": flat[start:stop].float().clone(), "param": flat[start:stop]}  # its own master
            yield OptimizerState(None, one, start, tensors)
