"""Selected tokens of sequence-parallel ranks equal those of the whole sequence, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.config import ParallelConfig
from megatron_vita.parallel import selection
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.selection import gather_selected, host_selection
from tests.models.watch import Watch
from tests.ranks import run_ranks

EACH = 6
"""Tokens of a rank."""


@given(ranks=st.integers(1, 5), each=st.integers(0, 7), data=st.data())
def test_gathering_what_every_rank_selects_gives_the_selected_tokens(
    ranks: int, each: int, data: st.DataObject
) -> None:
    length = ranks * each
    chosen = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    index = torch.tensor(chosen, dtype=torch.bool).nonzero().squeeze(1)
    tokens = torch.arange(length)
    by_rank = [host_selection(index, length, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(one.local) for one in by_rank}) == 1, "an all-gather needs equal lengths"
    gathered = torch.cat([tokens[rank * each :][one.local] for rank, one in enumerate(by_rank)])
    for rank, one in enumerate(by_rank):
        assert torch.equal(gathered[one.gathered], tokens[index])
        own = [token - rank * each for token in index.tolist() if token // max(each, 1) == rank]
        assert one.local[: one.count].tolist() == own
    assert len(by_rank[0].local) == max(one.count for one in by_rank)


def _check(index: list[int]) -> None:
    groups = build_groups(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))
    rank, group = groups.tp_rank, groups.collection.tp
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2 * EACH, 3, generator=generator, dtype=torch.float64)
    grads = torch.randn(2, len(index), 3, generator=generator, dtype=torch.float64)  # of each rank: partial sums
    hidden = whole.chunk(2)[rank].clone().requires_grad_()
    selected = host_selection(torch.tensor(index, dtype=torch.int64), 2 * EACH, rank=rank, ranks=2)
    with Watch(lambda new, _: large.append(new.shape) if len(new.shape) == 2 and len(new) == 2 * EACH else None):
        large: list[torch.Size] = []
        out = gather_selected(hidden, selected, group)
        out.backward(grads[rank])
    assert torch.equal(out, whole[index])
    expected = torch.zeros_like(whole).index_add_(0, selected.index, grads.sum(0)).chunk(2)[rank]
    torch.testing.assert_close(hidden.grad, expected)
    if len(index) < EACH:
        assert not large, "all tokens were gathered"
    destroy_groups()


def _check_all(indices: list[list[int]]) -> None:
    for index in indices:
        _check(index)


def test_forward_and_backward_equal_the_whole_sequence() -> None:
    """Selected tokens on both ranks, unevenly, on one rank only, all of them, none."""
    run_ranks(2, _check_all, [[1, 2, 7], [0, 5], [6, 11], [*range(2 * EACH)], []])


def _check_no_tokens() -> None:
    calls: list[str] = []
    selection.gather_tokens = lambda *_: calls.append("all-gather")  # type: ignore[assignment,func-returns-value]
    _check([])
    assert not calls


def test_without_selected_tokens_nothing_is_sent() -> None:
    run_ranks(2, _check_no_tokens)
