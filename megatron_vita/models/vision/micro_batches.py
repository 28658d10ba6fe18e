"""Encoder micro-batches: the vision tower runs on a few tiles at a time, with activation recomputation.

At any time only the activations of one micro-batch exist, beside the uint8 tiles and the visual tokens; the backward
encodes each micro-batch again. Legend: n tiles of this rank, P patches per tile, T tokens_per_tile, h decoder width.
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
class EncoderMicroBatch:
    """Tiles of one forward pass through the vision tower."""

    tiles: Tensor
    """uint8 [n, 3, S, S], a view of this rank's tiles; n may be 0."""
    counts: tuple[int, ...]
    """n on every tensor-parallel rank of a tensor-parallel tower; of this rank only for a replicated tower."""


def split_tiles(tiles: Tensor, counts: Sequence[int], at_once: int) -> list[EncoderMicroBatch]:
    """Split a rank's tiles into micro-batches, equally many on all ranks of `counts`.

    Args:
        tiles: uint8 [n, 3, S, S], of this rank.
        counts: n on every tensor-parallel rank of a tensor-parallel tower, else (n,).
        at_once: largest number of tiles of one rank in a micro-batch.
    """
    starts = range(0, max(counts), at_once)
    return [
        EncoderMicroBatch(
            tiles[start : start + at_once], tuple(min(max(count - start, 0), at_once) for count in counts)
        )
        for start in starts
    ]


def encode_in_micro_batches(
    encode: Callable[[EncoderMicroBatch], Tensor],
    micro_batches: Sequence[EncoderMicroBatch],
    shape: tuple[int, int],
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Encode micro-batches one after the other; recomputed in the backward unless there is only one.

    Args:
        encode: a micro-batch -> [n, T, h], differentiable in `parameters` only. Under tensor parallelism it contains
            collectives: all ranks pass equally many micro-batches.
        micro_batches: at least one.
        shape: (T, h).
        parameters: all parameters that `encode` uses, trainable or frozen.

    Returns:
        [sum of n, T, h], in the dtype of the parameters.
    """
    trainable = [one for one in parameters if one.requires_grad]
    if len(micro_batches) == 1:
        return encode(micro_batches[0])
    if trainable and torch.is_grad_enabled():
        out: Tensor = _RecomputedEncode.apply(encode, micro_batches, shape, *trainable)
        return out
    return _fill(encode, micro_batches, shape, parameters[0])


def _fill(
    encode: Callable[[EncoderMicroBatch], Tensor],
    micro_batches: Sequence[EncoderMicroBatch],
    shape: tuple[int, int],
    like: Tensor,
) -> Tensor:
    out = like.new_empty(sum(len(micro_batch.tiles) for micro_batch in micro_batches), *shape)
    start = 0
    with torch.no_grad():
        for micro_batch in micro_batches:
            stop = start + len(micro_batch.tiles)
            out[start:stop] = encode(micro_batch)
            start = stop
    return out


class _RecomputedEncode(torch.autograd.Function):
    """The forward keeps no graph; the backward recomputes and differentiates one micro-batch after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        encode: Callable[[EncoderMicroBatch], Tensor],
        micro_batches: Sequence[EncoderMicroBatch],
        shape: tuple[int, int],
        *trainable: Tensor,
    ) -> Tensor:
        ctx.encode, ctx.micro_batches = encode, micro_batches
        ctx.save_for_backward(*trainable)
        return _fill(encode, micro_batches, shape, trainable[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trainable = ctx.saved_tensors
        sums: list[Tensor] | None = None
        start = 0
        for micro_batch in ctx.micro_batches:
            with torch.enable_grad():
                features = ctx.encode(micro_batch)
            stop = start + len(micro_batch.tiles)
            grads = torch.autograd.grad(features, trainable, grad[start:stop])
            if sums is None:
                sums = [one.clone() for one in grads]
            else:
                for total, one in zip(sums, grads, strict=True):
                    total += one
            start = stop
        return None, None, None, *(sums or ())


def gather_uneven(local: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All-gather along dimension 0 with a different length on every rank. Not differentiable.

    Args:
        local: [n, ...], of this rank.
        counts: n on every rank of the group.
        group: all of its ranks call.

    Returns:
        [sum of counts, ...], in rank order.
    """
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    gathered = gather_tokens(padded, group).wait()
    return torch.cat([one[:count] for one, count in zip(gathered.split(longest), counts, strict=True)])


def select_local(states: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Select this rank's tiles from the output of a tensor-parallel tower; the backward all-gathers the gradients.

    Args:
        states: [sum of counts, P, tower width], the same on every rank.
        counts: number of tiles of every rank of the group.
        group: the tensor-parallel ranks; all of them call, forward and backward.

    Returns:
        [counts[rank], P, tower width], a copy.
    """
    out: Tensor = _SelectLocal.apply(states, tuple(counts), group)
    return out


class _SelectLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return states.split(list(counts))[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_uneven(grad, ctx.counts, ctx.group), None, None
