"""Hidden states of selected tokens, from the sequence-parallel ranks that hold them to all of these ranks.

The output layer needs those of labelled tokens only; all-gathering every token first would move and hold s/cp of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import gather_tokens, reduce_scatter_tokens


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """Selected tokens of a context rank, as one of the ranks needs them that its tokens are split over."""

    index: Tensor
    """int64 [n], indices into the tokens of the context rank, ascending; the same on every rank."""
    local: Tensor
    """int64 [most], indices into this rank's own tokens: its selected ones first, then zeros, up to the largest number
    of selected tokens on a rank."""
    gathered: Tensor
    """int64 [n], where each selected token lies among the [ranks * most] of an all-gather of `local`."""
    count: int
    """Selected tokens of this rank."""


def host_selection(index: Tensor, length: int, *, rank: int = 0, ranks: int = 1) -> SelectedTokens:
    """Selected tokens of one rank, tensors on the CPU. No communication.

    Args:
        index: int64 [n] on the CPU, indices into the tokens of the context rank, ascending.
        length: number of tokens of the context rank, a multiple of `ranks`, which hold equally many one after another.
        rank: of this rank among them: the tensor rank under sequence parallelism.
        ranks: that the tokens are split over.
    """
    each = length // ranks
    owner = index // max(each, 1)
    counts = torch.bincount(owner, minlength=ranks)
    starts = counts.cumsum(0) - counts
    most, count = int(counts.max()), int(counts[rank])
    local = torch.zeros(most, dtype=torch.int64)
    local[:count] = index[starts[rank] :][:count] - rank * each
    gathered = owner * most + torch.arange(len(index)) - starts[owner]
    return SelectedTokens(index, local, gathered, count)


def gather_selected(hidden: Tensor, selected: SelectedTokens, group: dist.ProcessGroup) -> Tensor:
    """Hidden states of the selected tokens on every rank; differentiable. All ranks of `group` call it.

    The backward sums the gradients over the ranks, each of which has a partial one, and returns them to the owners.

    Args:
        hidden: [t, h], of this rank's tokens.
        selected: of this rank.
        group: the ranks that the tokens of the context rank are split over.

    Returns:
        [n, h], in the order of `selected.index`.
    """
    out: Tensor = _GatherSelected.apply(hidden, selected, group)
    return out


class _GatherSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, selected: SelectedTokens, group: dist.ProcessGroup) -> Tensor:
        ctx.settings = hidden.shape, selected, group
        local = hidden.index_select(0, selected.local)
        return (gather_tokens(local, group).wait() if len(local) else local).index_select(0, selected.gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, selected, group = ctx.settings
        out = grad.new_zeros(shape)
        if len(selected.local):
            by_rank = grad.new_zeros(group.size() * len(selected.local), *grad.shape[1:])
            local = reduce_scatter_tokens(by_rank.index_copy_(0, selected.gathered, grad), group)
            out.index_copy_(0, selected.local[: selected.count], local[: selected.count])
        return out, None, None
