"""Encoder micro-batches: the vision tower runs on a few tiles at a time, with activation recomputation.

At any time only the activations of one micro-batch exist, beside the uint8 tiles and the visual tokens. If the tower
trains, the backward encodes each micro-batch again. A frozen tower encodes every tile once: its patch states are kept,
and the backward recomputes the projector alone. Legend: n tiles of this rank, P patches per tile, T tokens_per_tile, h
decoder width.
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


def split_tiles(tiles: Tensor, counts: Sequence[int], at_once: int, rank: int = 0) -> list[EncoderMicroBatch]:
    """Split the tiles of the ranks of `counts` into micro-batches, the same number of them on every rank.

    The first tile of every rank comes first, then the second of every rank, and so on: a micro-batch has equally many
    of each rank, to within one, as long as all of them have any left.

    Args:
        tiles: uint8 [n, 3, S, S], of this rank.
        counts: n on every tensor-parallel rank of a tensor-parallel tower, else (n,).
        at_once: largest number of tiles in a micro-batch, of all ranks of `counts` together.
        rank: this rank in `counts`.
    """
    owners = [owner for _, owner in sorted((tile, owner) for owner, n in enumerate(counts) for tile in range(n))]
    micro_batches, start = [], 0
    for first in range(0, len(owners), at_once):
        some = owners[first : first + at_once]
        each = tuple(some.count(owner) for owner in range(len(counts)))
        micro_batches.append(EncoderMicroBatch(tiles[start : start + each[rank]], each))
        start += each[rank]
    return micro_batches


def encode_in_micro_batches(
    tower: Callable[[EncoderMicroBatch], Tensor],
    projector: nn.Module,
    micro_batches: Sequence[EncoderMicroBatch],
    shape: tuple[int, int],
    tower_parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Encode micro-batches one after the other. What trains is recomputed in the backward unless there is only one.

    Args:
        tower: a micro-batch -> patch states [n, P, tower width], differentiable in `tower_parameters` only. Under
            tensor parallelism it contains collectives: all ranks pass equally many micro-batches.
        projector: patch states -> visual tokens [n, T, h].
        micro_batches: at least one.
        shape: (T, h).
        tower_parameters: all of them, trainable or frozen.

    Returns:
        [sum of n, T, h], in the dtype of the parameters.
    """
    counts = [len(one.tiles) for one in micro_batches]
    tower_trained, projector_trained = (
        [one for one in parameters if one.requires_grad and torch.is_grad_enabled()]
        for parameters in (tower_parameters, projector.parameters())
    )

    def both(micro_batch: EncoderMicroBatch) -> Tensor:
        tokens: Tensor = projector(tower(micro_batch))
        return tokens

    if tower_trained:
        return _recomputed(both, micro_batches, counts, shape, [*tower_trained, *projector_trained])
    with torch.no_grad():
        if not projector_trained:
            return _fill(both, micro_batches, counts, shape, next(projector.parameters()))
        states = [tower(one) for one in micro_batches]
    return _recomputed(projector, states, counts, shape, projector_trained)


def _recomputed(
    encode: Callable[[Any], Tensor],
    inputs: Sequence[Any],
    counts: Sequence[int],
    shape: tuple[int, int],
    trained: Sequence[nn.Parameter],
) -> Tensor:
    if len(inputs) == 1:
        return encode(inputs[0])
    out: Tensor = _RecomputedEncode.apply(encode, inputs, counts, shape, *trained)
    return out


def _fill(
    encode: Callable[[Any], Tensor], inputs: Sequence[Any], counts: Sequence[int], shape: tuple[int, int], like: Tensor
) -> Tensor:
    out = like.new_empty(sum(counts), *shape)
    for part, one in zip(out.split(list(counts)), inputs, strict=True):
        part.copy_(encode(one))
    return out


class _RecomputedEncode(torch.autograd.Function):
    """The forward keeps no graph; the backward recomputes and differentiates one micro-batch after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        encode: Callable[[Any], Tensor],
        inputs: Sequence[Any],
        counts: Sequence[int],
        shape: tuple[int, int],
        *trained: Tensor,
    ) -> Tensor:
        ctx.encode, ctx.inputs, ctx.counts = encode, inputs, counts
        ctx.save_for_backward(*trained)
        return _fill(encode, inputs, counts, shape, trained[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trained = ctx.saved_tensors
        # megatron-core holds a micro-batch's graph until the next one's loss is there: it must not hold the inputs.
        inputs, ctx.inputs = ctx.inputs, None
        # Sums of bfloat16 over many micro-batches would lose the small ones.
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in trained]
        for one, part in zip(inputs, grad.split(list(ctx.counts)), strict=True):
            with torch.enable_grad():
                tokens = ctx.encode(one)
            for total, added in zip(sums, torch.autograd.grad(tokens, trained, part), strict=True):
                total += added
        return None, None, None, None, *(total.to(one.dtype) for total, one in zip(sums, trained, strict=True))


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
