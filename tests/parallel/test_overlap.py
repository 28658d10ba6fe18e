"""Ring attention: what is in flight while blocks are computed, and how many kernels a packed row launches."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel import block_kernels, exchange
from megatron_vita.parallel.document_attention import document_attention
from megatron_vita.parallel.schedule import build_schedule
from tests.parallel.launches import GPU, Group, calls, launches, sixty_documents

KEYS, GRADIENTS = 0, 1
"""Tags of the two rings."""


class _Recorder:
    """Collectives and kernels that only write down when they are posted, waited for and called."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.flying: set[str] = set()
        self._posted = [0, 0]

    def ring(self, tensor: torch.Tensor, group: Group, tag: int) -> Any:
        self._posted[tag] += 1
        name = f"{('keys', 'gradients')[tag]} {self._posted[tag]}"
        self.events.append(f"post {name}")
        self.flying.add(name)
        received = torch.zeros_like(tensor)

        class _Handle:
            def wait(_) -> torch.Tensor:  # noqa: N805
                self.events.append(f"wait {name}")
                self.flying.discard(name)
                return received

        return _Handle()

    def kernel(self, right: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            blocks = next(one for one in (*args, *kwargs.values()) if isinstance(one, block_kernels.Blocks))
            kind = "diagonal" if blocks.causal else "blocks"
            self.events.append(f"{kind} beside {', '.join(sorted(self.flying)) or 'nothing'}")
            return right(*args, **kwargs)

        return call


def _recorded(ranks: int, rank: int) -> tuple[list[str], list[str]]:
    """Events of forward and backward over one document."""
    schedule = build_schedule(SequenceLayout((8 * ranks,), cp=ranks), rank, torch.device("cpu"), "p2p")
    q, k, v = (torch.randn(8, 2, 8, requires_grad=True) for _ in range(3))
    found = []
    for backward in (False, True):
        recorder = _Recorder()
        if backward:
            out = document_attention(q, k, v, schedule, Group(ranks), 0.3)  # type: ignore[arg-type]
        with (
            mock.patch.object(exchange, "ring_send_recv", recorder.ring),
            mock.patch.object(block_kernels, "forward", recorder.kernel(block_kernels.forward)),
            mock.patch.object(block_kernels, "backward", recorder.kernel(block_kernels.backward)),
        ):
            if backward:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            else:
                document_attention(q, k, v, schedule, Group(ranks), 0.3)  # type: ignore[arg-type]
        found.append(recorder.events)
    return found[0], found[1]


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ring_send_recv", _Recorder().ring)


def test_the_next_keys_are_under_way_while_a_block_is_computed() -> None:
    forward, backward = _recorded(ranks=4, rank=2)  # it has blocks in every step
    assert forward == [
        "post keys 1",
        "diagonal beside keys 1",
        "blocks beside keys 1",
        "wait keys 1", "post keys 2", "blocks beside keys 2",
        "wait keys 2", "post keys 3", "blocks beside keys 3",
        "wait keys 3", "blocks beside nothing",
    ]  # fmt: skip
    assert backward == [
        "post keys 1",
        "blocks beside keys 1",
        "wait keys 1", "post keys 2", "blocks beside keys 2", "post gradients 1",
        "wait keys 2", "post keys 3", "blocks beside gradients 1, keys 3", "wait gradients 1", "post gradients 2",
        "wait keys 3", "blocks beside gradients 2", "wait gradients 2", "post gradients 3",
        "diagonal beside gradients 3",
        "wait gradients 3",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_no_rank_computes_while_nothing_is_under_way_but_in_the_last_step(ranks: int) -> None:
    for rank in range(ranks):
        forward, backward = _recorded(ranks, rank)
        alone = [event for event in forward if event.endswith("beside nothing")]
        assert len(alone) <= 1
        if alone:
            assert forward[-1] == alone[0]
        assert not [event for event in backward if event.endswith("beside nothing") and ranks > 2]
        for events, rings in ((forward, ("keys",)), (backward, ("keys", "gradients"))):
            for ring in rings:
                hops = [event for event in events if event.endswith(tuple(f"{ring} {hop}" for hop in range(1, ranks)))]
                posts = [event for event in hops if event.startswith("post")]
                waits = [event for event in hops if event.startswith("wait")]
                assert posts == [f"post {ring} {hop}" for hop in range(1, ranks)]
                assert waits == [f"wait {ring} {hop}" for hop in range(1, ranks)]


# ---- kernel launches ----

A_CALL, A_STEP, ONCE = (12, 14), (0, 4), (6, 10)
"""Kernels launched at most by a call on blocks of a step, by a step, and by a layer besides: forward and backward."""


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[SequenceLayout, str]:
    """Rows of short and long documents on 1 to 8 ranks."""
    cp = draw(st.sampled_from([1, 2, 4, 8]))
    lengths = st.one_of(st.integers(1, 60), st.integers(100, 3000), st.integers(9000, 60_000))
    documents = draw(st.lists(lengths, min_size=1, max_size=20))
    spare = -sum(documents) % cp
    layout = SequenceLayout((*documents, spare) if spare else tuple(documents), cp=cp)
    return layout, draw(st.sampled_from(["p2p", "all_gather", "a2a"]))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(packed_rows(), st.integers(0, 7))
def test_launches_of_a_layer_are_bounded_by_its_steps(row: tuple[SequenceLayout, str], rank: int) -> None:
    """Not by its documents: a diagonal call, at most four calls a step, and a few kernels around each."""
    layout, kind = row
    schedule = build_schedule(layout, rank % layout.cp, GPU, kind)
    each = calls(schedule)
    assert max(each) <= 4
    heads = (8, 8) if kind == "a2a" else (5, 1)
    for counts, a_call, a_step, once in zip(
        launches(schedule, layout.cp, heads=heads), A_CALL, A_STEP, ONCE, strict=True
    ):
        assert sum(counts.values()) <= once + a_call * sum(each[1:]) + a_step * len(schedule.steps), counts
        flash = sum(count for name, count in counts.items() if "flash" in name)
        assert flash == sum(each)


@pytest.mark.parametrize("cp", [1, 2, 8])
@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_many_short_documents_are_one_call_a_step(cp: int, kind: str) -> None:
    for rank in range(cp):
        schedule = build_schedule(SequenceLayout(sixty_documents(), cp=cp), rank, GPU, kind)
        assert max(calls(schedule)) == 1
        blocks = schedule.diagonal.blocks
        assert sum(run[0] for run in blocks.runs) >= 60


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=80), st.sampled_from([2, 4, 8]))
def test_queries_that_follow_each_other_are_a_view(documents: list[int], cp: int) -> None:
    """On a GPU blocks are not sorted by shape: where all documents take part, queries are neither gathered nor
    scattered."""
    layout = SequenceLayout((*documents, cp - sum(documents) % cp), cp=cp)
    for rank in range(cp):
        for step in build_schedule(layout, rank, GPU, "p2p").steps:
            for off in step:
                if off.queries.count == layout.local_length:
                    assert off.queries.index is None
