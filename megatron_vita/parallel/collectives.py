"""The collectives of tensors, each into a buffer that it makes itself.

A backend moves memory in the order in which it lies, not in the order of the indices: a source that is a transposed
view, or a target made by `empty_like` of one, permutes data without any error (seen under gloo). So every function here
takes tensors of any strides, sends contiguous memory and receives into contiguous memory, and no other file of this
room or of the models calls torch.distributed for tensors; a test reads the sources and keeps it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AsyncTensor:
    """A tensor that is under way."""

    def __init__(self, tensor: Tensor, works: Sequence[Any], sent: Tensor) -> None:
        self._tensor = tensor
        self._works = works
        self._sent = sent  # the backend reads it until the work is done

    def wait(self) -> Tensor:
        """The tensor, once it is there (on CUDA: for everything that is launched from now on)."""
        for work in self._works:
            work.wait()
        self._works = ()
        return self._tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> AsyncTensor:
    """[n, ...] of every rank, the same n everywhere -> [ranks * n, ...] in rank order."""
    mine = rows.contiguous()
    everyone = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
    work = dist.all_gather_into_tensor(everyone, mine, group=group, async_op=True)
    return AsyncTensor(everyone, [work], mine)


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks * n, ...] in rank order, summed over the group -> this rank's [n, ...]."""
    by_rank = rows.contiguous()
    mine = by_rank.new_empty(by_rank.shape[0] // group.size(), *by_rank.shape[1:])
    dist.reduce_scatter_tensor(mine, by_rank, group=group)
    return mine


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all: `sent[r]` rows go to rank r, in order; `received[r]` come from it -> [sum of received, ...]."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def ring_send_recv(tensor: Tensor, group: dist.ProcessGroup, tag: int) -> AsyncTensor:
    """Send to the next rank of the group and receive from the one before, the same shape everywhere.

    Both are posted at once and as one batch, so no order of ranks can block: `AsyncTensor.wait` is what waits.

    Args:
        tensor: what goes round.
        group: at least two ranks; all of them call.
        tag: keeps two rings that are under way at once apart under gloo. NCCL has no tags: there the order of calls,
            the same on every rank, does it.
    """
    mine = tensor.contiguous()
    coming = torch.empty_like(mine, memory_format=torch.contiguous_format)
    ranks = group.size()
    after, before = ((group.rank() + step) % ranks for step in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine, dist.get_global_rank(group, after), group, tag),
            dist.P2POp(dist.irecv, coming, dist.get_global_rank(group, before), group, tag),
        ]
    )
    return AsyncTensor(coming, works, mine)


def reduce_(tensor: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce over the group, in place.

    Raises:
        ValueError: the tensor is not contiguous; ranks with other strides would add what does not belong together.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor {list(tensor.shape)} with strides {tensor.stride()} cannot be reduced in place")
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
