"""Tensor collectives that accept any strides.

torch.distributed sends and receives raw memory, not logical elements: a non-contiguous input, or an output buffer made
by `empty_like` of one, silently permutes the data (observed with gloo). Every function here therefore sends a
contiguous copy and receives into a contiguous buffer that it allocates. Other files of parallel/ and models/ do not
call torch.distributed collectives on tensors; tests/parallel/test_collectives.py enforces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AsyncTensor:
    """Handle of an asynchronous collective and its output tensor."""

    def __init__(self, tensor: Tensor, works: Sequence[Any], sent: Tensor) -> None:
        self._tensor = tensor
        self._works = works
        self._sent = sent  # keeps the send buffer alive until the work is done

    def wait(self) -> Tensor:
        """Wait for the collective and return its output (on CUDA: order it before later work of the current stream)."""
        for work in self._works:
            work.wait()
        self._works = ()
        return self._tensor


def gather_tokens(tokens: Tensor, group: dist.ProcessGroup) -> AsyncTensor:
    """Asynchronous all-gather along dimension 0: [n, ...] with the same n on every rank -> [ranks * n, ...]."""
    local = tokens.contiguous()
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    work = dist.all_gather_into_tensor(gathered, local, group=group, async_op=True)
    return AsyncTensor(gathered, [work], local)


def reduce_scatter_tokens(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter (sum) along dimension 0: [ranks * n, ...] in rank order -> this rank's [n, ...]."""
    by_rank = tokens.contiguous()
    local = by_rank.new_empty(by_rank.shape[0] // group.size(), *by_rank.shape[1:])
    dist.reduce_scatter_tensor(local, by_rank, group=group)
    return local


def exchange_tokens(tokens: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all along dimension 0 with uneven splits.

    Args:
        tokens: [sum of sent, ...], ordered by destination rank.
        sent: number of tokens for each rank.
        received: number of tokens from each rank.
        group: all of its ranks call.

    Returns:
        [sum of received, ...], ordered by source rank.
    """
    out = tokens.new_empty(sum(received), *tokens.shape[1:])
    dist.all_to_all_single(out, tokens.contiguous(), list(received), list(sent), group=group)
    return out


def ring_send_recv(tensor: Tensor, group: dist.ProcessGroup, tag: int) -> AsyncTensor:
    """Asynchronously send to the next rank of the group and receive from the previous one.

    Send and receive are posted as one batch, so no order of ranks can deadlock.

    Args:
        tensor: the same shape and dtype on every rank.
        group: at least two ranks; all of them call.
        tag: separates two rings in flight under gloo. NCCL ignores tags and matches by the order of calls, which must
            be the same on every rank.
    """
    local = tensor.contiguous()
    received = torch.empty_like(local, memory_format=torch.contiguous_format)
    ranks = group.size()
    following, previous = ((group.rank() + step) % ranks for step in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, local, dist.get_global_rank(group, following), group, tag),
            dist.P2POp(dist.irecv, received, dist.get_global_rank(group, previous), group, tag),
        ]
    )
    return AsyncTensor(received, works, local)


def reduce_(tensor: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """All-reduce in place.

    Raises:
        ValueError: the tensor is not contiguous: ranks with different strides would add unrelated elements.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor {list(tensor.shape)} with strides {tensor.stride()} cannot be reduced in place")
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def broadcast_(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Overwrite a contiguous tensor with that of one rank of the group, given by its rank in the world."""
    if group.size() > 1:
        dist.broadcast(tensor, src=source, group=group)


def send_to_next(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Send to the next rank of the group, which calls `receive_from_previous`."""
    dist.send(tensor.contiguous(), dist.get_global_rank(group, group.rank() + 1), group=group)


def receive_from_previous(shape: Sequence[int], like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Receive a tensor of `like`'s dtype and device from the previous rank of the group."""
    received = like.new_empty(shape)
    dist.recv(received, dist.get_global_rank(group, group.rank() - 1), group=group)
    return received
