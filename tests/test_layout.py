"""Ownership of tokens and tiles for any documents: every token exactly once, equal counts on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.errors import ConfigError
from megatron_vita.layout import SequenceLayout, TileRoutes, most_tokens
from tests.packed_lengths import MIXES, packed_documents

quick = settings(max_examples=60, deadline=None)
degrees = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw: st.DrawFn, *, longest: int = 60) -> SequenceLayout:
    cp, sp = draw(degrees), draw(st.sampled_from([1, 2, 4]))
    documents = draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    spare = -sum(documents) % (cp * sp)
    return SequenceLayout((*documents, spare) if spare else tuple(documents), cp=cp, sp=sp)


@quick
@given(layouts())
def test_ranks_partition_the_packed_sequence_equally(layout: SequenceLayout) -> None:
    owned = [layout.local_positions(rank) for rank in range(layout.cp)]
    assert sorted(np.concatenate(owned).tolist()) == list(range(layout.length))
    for rank, positions in enumerate(owned):
        assert len(positions) == layout.local_length
        assert np.all(np.diff(positions) > 0)
        owner, index = layout.owner
        assert np.all(owner[positions] == rank)
        assert np.array_equal(index[positions], np.arange(len(positions)))


@quick
@given(layouts())
def test_spans_cover_the_local_tokens_in_order(layout: SequenceLayout) -> None:
    for rank in range(layout.cp):
        local = 0
        for span in layout.spans(rank):
            assert span.local_start == local
            assert 0 <= span.start < span.stop <= layout.documents[span.document]
            local += span.stop - span.start
        assert local == layout.local_length
    assert sum(layout.attention_work(rank) for rank in range(layout.cp)) == sum(
        n * (n + 1) // 2 for n in layout.documents
    )


@quick
@given(layouts())
def test_no_rank_owns_more_of_a_document_than_may_be(layout: SequenceLayout) -> None:
    for document, length in enumerate(layout.documents):
        owned = [
            sum(span.stop - span.start for span in layout.spans(rank) if span.document == document)
            for rank in range(layout.cp)
        ]
        most = most_tokens(length, layout.cp, first=document == 0)
        assert max(owned) <= most
        assert most - max(owned) <= (0 if document == 0 else 1)


@quick
@given(layouts())
def test_positions_restart_with_every_document(layout: SequenceLayout) -> None:
    want = np.concatenate([np.arange(n) for n in layout.documents])
    assert np.array_equal(layout.positions_in_document, want)


@pytest.mark.slow
@pytest.mark.parametrize("cp", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_work_is_even_on_packed_documents_without_any_padding(mix: str, cp: int) -> None:
    for documents in packed_documents(mix, 131072, count=2):
        layout = SequenceLayout(documents, cp=cp, sp=8)
        assert layout.length == 131072  # no document is padded, and the packed sequence needs no padding either
        work = [layout.attention_work(rank) for rank in range(cp)]
        assert max(work) <= 1.01 * sum(work) / cp


@pytest.mark.parametrize(
    ("documents", "cp", "sp", "message"),
    [((), 1, 1, "at least one token"), ((4, 0), 1, 1, "at least one token"), ((7,), 2, 2, "Pad it to 8")],
)
def test_impossible_layouts_raise(documents: tuple[int, ...], cp: int, sp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequenceLayout(documents, cp=cp, sp=sp)


@pytest.mark.slow
@quick
@given(layouts(longest=40), st.sampled_from([1, 4]), st.integers(1, 4), st.data())
def test_visual_tokens_arrive_once_at_the_owner(
    layout: SequenceLayout, tokens_per_tile: int, tp: int, data: st.DataObject
) -> None:
    tp = layout.sp if layout.sp > 1 else tp
    slots = layout.length // tokens_per_tile
    taken = sorted(data.draw(st.sets(st.integers(0, slots - 1), max_size=20))) if slots else []
    first = np.array(taken, dtype=np.int64) * tokens_per_tile
    routes = TileRoutes(layout, first, tokens_per_tile, tp=tp)
    group = range(routes.group_size)
    sizes = [len(routes.tiles_of(rank)) for rank in group]
    assert sum(sizes) == len(first)
    assert max(sizes) - min(sizes) <= 1
    arrived: list[tuple[int, int]] = []
    for target in group:
        places, counts = routes.receive(target)
        assert len(places) == sum(counts)
        assert len(set(places.tolist())) == len(places), "two visual tokens for one placeholder"
        if len(places):
            assert max(places) < layout.local_length // layout.sp
        offset = 0
        for source in group:
            picked, sent = routes.send(source)
            assert sent[target] == counts[source]
            start = sum(sent[:target])
            for index, place in zip(
                picked[start : start + sent[target]], places[offset : offset + counts[source]], strict=True
            ):
                number = int(index) + routes.tiles_of(source).start * tokens_per_tile
                cp_rank, tp_rank = divmod(target, tp)
                shard = layout.local_length // layout.sp
                position = layout.local_positions(cp_rank)[place + (tp_rank * shard if layout.sp > 1 else 0)]
                tile, token = divmod(number, tokens_per_tile)
                assert position == first[tile] + token
                arrived.append((number, target))
            offset += counts[source]
    copies = 1 if layout.sp > 1 else tp
    assert len(arrived) == len(set(arrived)) == len(first) * tokens_per_tile * copies
