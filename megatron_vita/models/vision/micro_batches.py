"""Many tiles through the tower, a micro-chunk at a time, in the memory of one.

Beyond the tiles (uint8) and their features, which are written where they belong as they come, only one micro-chunk's
activations are ever held: each is encoded again in the backward. Legend: n tiles, P patches, T tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vita.parallel.collectives import gather_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One micro-chunk."""

    tiles: Tensor
    """uint8 [n, 3, S, S], a view of the rank's tiles."""
    counts: tuple[int, ...]
    """n of every rank that encodes together with this one; of this one alone where nobody does."""


def make_turns(tiles: Tensor, counts: Sequence[int], at_once: int) -> list[Turn]:
    """Cut a rank's tiles into turns, the same number on every rank that encodes together.

    Args:
        tiles: uint8 [n, 3, S, S], this rank's.
        counts: n of every rank that encodes together.
        at_once: most tiles that a rank gives to one turn.
    """
    starts = range(0, max(counts), at_once)
    return [
        Turn(tiles[start : start + at_once], tuple(min(max(count - start, 0), at_once) for count in counts))
        for start in starts
    ]


def encode_in_micro_batches(
    encode: Callable[[Turn], Tensor],
    turns: Sequence[Turn],
    shape: tuple[int, int],
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Features of all turns' tiles, in order.

    Args:
        encode: a turn's tiles -> [n, T, h]; differentiable in `parameters` and in nothing else.
        turns: at least one.
        shape: (T, h).
        parameters: everything that `encode` uses.

    Returns:
        [n of all turns, T, h], in the parameters' dtype.
    """
    trainable = [one for one in parameters if one.requires_grad]
    if len(turns) == 1:
        return encode(turns[0])
    if trainable and torch.is_grad_enabled():
        out: Tensor = _Turns.apply(encode, turns, shape, *trainable)
        return out
    return _fill(encode, turns, shape, parameters[0])


def _fill(encode: Callable[[Turn], Tensor], turns: Sequence[Turn], shape: tuple[int, int], like: Tensor) -> Tensor:
    out = like.new_empty(sum(len(turn.tiles) for turn in turns), *shape)
    start = 0
    with torch.no_grad():
        for turn in turns:
            stop = start + len(turn.tiles)
            out[start:stop] = encode(turn)
            start = stop
    return out


class _Turns(torch.autograd.Function):
    """No graph of the forward is kept; the backward builds that of one turn after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        encode: Callable[[Turn], Tensor],
        turns: Sequence[Turn],
        shape: tuple[int, int],
        *trainable: Tensor,
    ) -> Tensor:
        ctx.encode, ctx.turns = encode, turns
        ctx.save_for_backward(*trainable)
        return _fill(encode, turns, shape, trainable[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trainable = ctx.saved_tensors
        sums: list[Tensor] | None = None
        start = 0
        for turn in ctx.turns:
            with torch.enable_grad():
                features = ctx.encode(turn)
            stop = start + len(turn.tiles)
            grads = torch.autograd.grad(features, trainable, grad[start:stop])
            if sums is None:
                sums = [one.clone() for one in grads]
            else:
                for total, one in zip(sums, grads, strict=True):
                    total += one
            start = stop
        return None, None, None, *(sums or ())


def gather_uneven(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, as the ranks of a split tower encode their tiles together. Not differentiable.

    Args:
        rows: [n, ...], this rank's.
        counts: n of every rank of the group.
        group: the tensor-parallel ranks.

    Returns:
        [sum of counts, ...], in rank order.
    """
    longest = max(counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = gather_tokens(padded, group).wait()
    return torch.cat([part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)])


def take_own(states: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's tiles of what all ranks of a split tower hold; the backward puts everybody's gradients together.

    Args:
        states: [sum of counts, P, h], the same on every rank.
        counts: tiles of every rank of the group.
        group: the tensor-parallel ranks.

    Returns:
        [counts[rank], P, h].
    """
    out: Tensor = _TakeOwn.apply(states, tuple(counts), group)
    return out


class _TakeOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return states.split(list(counts))[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_uneven(grad, ctx.counts, ctx.group), None, None
