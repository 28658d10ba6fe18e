"""Kernel launches of attention over a packed row, counted without a GPU: operators on tensors of the `meta` device.

python -m tests.parallel.launches        the rows of the table in docs/gpu.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vita.parallel import exchange
from megatron_vita.parallel.collectives import AsyncTensor
from megatron_vita.parallel.document_attention import document_attention
from megatron_vita.parallel.schedule import Schedule

GPU = torch.device("meta")
_FREE = (
    "empty", "empty_like", "new_empty", "empty_strided", "view", "_unsafe_view", "transpose", "t", "slice", "select",
    "unbind", "split", "split_with_sizes", "unsqueeze", "squeeze", "expand", "detach", "alias", "permute", "as_strided",
)  # fmt: skip
"""Operators that launch nothing: views and allocations."""


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Group:
    """Stands for a context-parallel group of which this process is one rank."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks

    def rank(self) -> int:
        return 0


def _ring(tensor: Tensor, group: Group, tag: int) -> AsyncTensor:
    return AsyncTensor(torch.empty_like(tensor.contiguous()), (), tensor)


def _gather(tensor: Tensor, group: Group) -> AsyncTensor:
    local = tensor.contiguous()
    return AsyncTensor(local.new_empty(group.size() * len(local), *local.shape[1:]), (), local)


def _scatter(tensor: Tensor, group: Group) -> Tensor:
    return tensor.contiguous().new_empty(len(tensor) // group.size(), *tensor.shape[1:])


def _exchange(tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    return tensor.contiguous().new_empty(sum(received), *tensor.shape[1:])


def launches(schedule: Schedule, ranks: int, *, heads: tuple[int, int] = (5, 1)) -> tuple[Counter[str], Counter[str]]:
    """Kernels that one layer's attention launches over a schedule, forward and backward; bfloat16, head size 128."""
    group = Group(ranks) if ranks > 1 else None
    q, k, v = (
        torch.empty(schedule.tokens, count, 128, dtype=torch.bfloat16, device=GPU, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    grad = torch.empty(schedule.tokens, heads[0], 128, dtype=torch.bfloat16, device=GPU)
    fakes = {"ring_send_recv": _ring, "gather_tokens": _gather, "reduce_scatter_tokens": _scatter}
    with mock.patch.multiple(exchange, exchange_tokens=_exchange, **fakes):
        with Launches() as forward:
            out = document_attention(q, k, v, schedule, group, 0.1)  # type: ignore[arg-type]
        with Launches() as backward:
            torch.autograd.grad(out, (q, k, v), grad)
    return forward.counts, backward.counts


def calls(schedule: Schedule) -> list[int]:
    """Attention kernel calls of the diagonal blocks and of each communication step; the same in the backward."""
    return [1, *(len(step) for step in schedule.steps)]


def sixty_documents(length: int = 16384, seed: int = 0) -> tuple[int, ...]:
    """A packed row of 60 documents of uneven lengths."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, 60)
    lengths = np.maximum(1, (weights / weights.sum() * length).astype(int))
    lengths[-1] += length - lengths.sum()
    return tuple(int(one) for one in lengths)
