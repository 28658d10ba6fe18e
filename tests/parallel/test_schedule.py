"""The blocks of all ranks are the causal mask of every document: each pair once, nothing masked, little padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.schedule import Schedule, build_schedule
from megatron_vita.parallel.tables import TokenIndex
from tests.packed_lengths import MIXES, packed_documents

CPU = torch.device("cpu")
KINDS = ("p2p", "all_gather", "a2a")
quick = settings(max_examples=80, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> SequenceLayout:
    """Documents of 1 to 40 tokens, some much longer, on 1 to 8 ranks."""
    cp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    documents = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 3), st.integers(100, 300)), max_size=10))
    spare = -sum(documents) % cp or (0 if documents else cp)
    return SequenceLayout((*documents, spare) if spare else tuple(documents), cp=cp)


def _indices(tokens: TokenIndex) -> np.ndarray:
    return np.arange(tokens.start, tokens.start + tokens.count) if tokens.index is None else tokens.index.numpy()


def _count(schedule: Schedule, own: np.ndarray, sources: list[np.ndarray], seen: np.ndarray) -> None:
    """Add one to every (query, key) pair of global indices that the schedule's blocks compute for real tokens."""
    diagonal = schedule.diagonal
    to_blocks = np.arange(len(own)) if diagonal.to_blocks is None else diagonal.to_blocks.numpy()
    padding = set() if diagonal.padding is None else set(diagonal.padding.tolist())
    start = 0
    for count, length, keys in diagonal.blocks.runs:
        assert length == keys
        for _ in range(count):
            block = [own[to_blocks[place]] for place in range(start, start + length) if place not in padding]
            for number, query in enumerate(block):
                seen[query, block[: number + 1]] += 1
            start += length
    assert start == len(to_blocks)
    for step, source in zip(schedule.steps, sources, strict=True):
        for off in step:
            queries, keys = own[_indices(off.queries)], source[_indices(off.keys)]
            at = [0, 0]
            for count, many_queries, many_keys in off.blocks.runs:
                for _ in range(count):
                    seen[np.ix_(queries[at[0] : at[0] + many_queries], keys[at[1] : at[1] + many_keys])] += 1
                    at = [at[0] + many_queries, at[1] + many_keys]
            assert at == [len(queries), len(keys)]


@quick
@given(layouts(), st.sampled_from(KINDS))
def test_blocks_of_all_ranks_are_the_causal_mask_once(layout: SequenceLayout, kind: str) -> None:
    seen = np.zeros((layout.length, layout.length), dtype=np.int64)
    ranks = [0] if kind == "a2a" else range(layout.cp)  # with a2a every rank computes all tokens, for other heads
    for rank in ranks:
        schedule = build_schedule(layout, rank, CPU, kind)
        everything = np.arange(layout.length)
        own = everything if kind == "a2a" or layout.cp == 1 else layout.local_positions(rank)
        sources = [everything]
        if kind == "p2p":
            sources = [layout.local_positions((rank - step) % layout.cp) for step in range(layout.cp)]
        _count(schedule, own, sources if schedule.steps else [], seen)
    want = np.zeros_like(seen)
    for start, length in zip(layout.starts, layout.documents, strict=True):
        want[start : start + length, start : start + length] = np.tri(length, dtype=np.int64)
    assert np.array_equal(seen, want)


@quick
@given(layouts(), st.sampled_from(("all_gather", "a2a")))
def test_sequence_order_and_rank_order_are_inverse(layout: SequenceLayout, kind: str) -> None:
    schedule = build_schedule(layout, 0, CPU, kind)
    if layout.cp == 1:
        return
    by_rank = torch.from_numpy(np.concatenate([layout.local_positions(rank) for rank in range(layout.cp)]))
    by_position = schedule.to_sequence_order(by_rank)
    assert torch.equal(by_position, torch.arange(layout.length))
    assert torch.equal(schedule.to_rank_order(by_position), by_rank)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("cp", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_little_more_than_the_mask(mix: str, cp: int, kind: str) -> None:
    (documents,) = packed_documents(mix, 131072, count=1)
    layout = SequenceLayout(documents, cp=cp)
    ideal = sum(n * (n + 1) // 2 for n in documents)
    for rank in {0, 1 % cp, cp // 2, cp - 1} if kind != "a2a" else {0}:
        share = 1 if kind == "a2a" else cp  # a2a: all tokens, for 1 / cp of the heads
        assert build_schedule(layout, rank, CPU, kind).pairs <= 1.02 * ideal / share


def test_tiny_documents_share_a_call_and_long_ones_are_never_padded() -> None:
    tiny = (5, 8, 3, 7, 4, 6) * 40
    schedule = build_schedule(SequenceLayout((900, *tiny, 890)), 0, CPU)
    assert schedule.diagonal.blocks.runs == ((1, 900, 900), (1, 890, 890), (80, 8, 8), (80, 6, 6), (80, 4, 4))
    assert schedule.diagonal.padding is not None
    assert len(schedule.diagonal.padding) == 80 * 18 - sum(tiny)


def test_nothing_but_tiny_documents_is_padded_within_the_allowance() -> None:
    documents = (5, 8, 3, 7, 4, 6) * 40
    schedule = build_schedule(SequenceLayout(documents), 0, CPU)
    assert len(schedule.diagonal.blocks.runs) == 6
    assert schedule.pairs <= 1.01 * sum(n * (n + 1) // 2 for n in documents)


def test_long_documents_are_not_copied() -> None:
    schedule = build_schedule(SequenceLayout((50, 51, 49, 52, 700, 690, 12)), 0, CPU)
    assert schedule.diagonal.to_blocks is None
    assert len(schedule.diagonal.blocks.runs) == 7


@pytest.mark.parametrize("documents", [(64,), (16, 16, 16, 16)])
def test_equal_documents_are_not_copied(documents: tuple[int, ...]) -> None:
    schedule = build_schedule(SequenceLayout(documents), 0, CPU)
    assert schedule.diagonal.blocks.runs == ((len(documents), documents[0], documents[0]),)
    assert schedule.diagonal.to_blocks is None


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_one_document_is_read_through_views(kind: str) -> None:
    for rank in range(4):
        for step in build_schedule(SequenceLayout((65536,), cp=4), rank, CPU, kind).steps:
            assert all(off.queries.index is None and off.keys.index is None for off in step)


def test_equal_short_blocks_go_through_one_call() -> None:
    schedule = build_schedule(SequenceLayout((64,) * 8, cp=2), 0, CPU, "p2p")
    assert [[off.blocks.runs for off in step] for step in schedule.steps] == [[((8, 16, 16),)], [((8, 16, 32),)]]


@pytest.mark.parametrize("kind", KINDS)
def test_off_the_cpu_blocks_have_bounds_and_no_padding(kind: str) -> None:
    documents = (5, 8, 3, 7, 4, 6) * 40 + (300,)
    for rank in range(4):
        schedule = build_schedule(SequenceLayout(documents, cp=4), rank, torch.device("meta"), kind)
        assert schedule.diagonal.padding is None
        for blocks in [schedule.diagonal.blocks, *(off.blocks for step in schedule.steps for off in step)]:
            count = sum(run[0] for run in blocks.runs)
            assert blocks.bounds is not None
            assert [(len(side), side.dtype, side.is_contiguous()) for side in blocks.bounds] == [
                (count + 1, torch.int32, True)
            ] * 2
        assert all(len(step) <= 1 for step in schedule.steps)  # one call a step
