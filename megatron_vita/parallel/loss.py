"""Output layer fused with vocabulary-parallel cross entropy: chunked over labelled tokens, never all logits at once.

The forward computes the gradients of hidden states and weight too, while a chunk's logits exist: three matrix products,
as without chunking. The backward scales them, which is exact if all tokens get the same upstream gradient, as under the
sum of a training step. Otherwise the backward recomputes the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import reduce_

_MIN_TOKENS = 256
"""Smallest chunk in tokens: with fewer, reading the weight from memory takes longer than the matrix product."""
_BLOCK = 16 * 1024**2
"""Numbers of the weight's gradient that exist at once in the weight's dtype, beside the float32 gradient itself."""
_MIN_CHUNKS = 32
"""A chunk has at most 1/32 of the labelled tokens, unless that were fewer than _MIN_TOKENS."""


def vocab_parallel_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Per-token loss -log softmax(hidden @ weight.T)[label]. All ranks of `group` call it, with the same tokens.

    The gradient of `hidden` is this rank's partial sum (its vocabulary shard): the caller all-reduces it over the
    group.

    Args:
        hidden: [n, h], hidden states of the labelled tokens; n may be 0.
        weight: [padded vocabulary / group size, h], this rank's shard of the output layer.
        labels: int64 [n], in 0..vocab_size - 1.
        vocab_size: vocabulary without padding; padding columns are excluded from the softmax.
        group: the tensor-parallel ranks.

    Returns:
        [n], float32 or wider, the same on every rank of the group.
    """
    start = group.rank() * weight.shape[0]
    return _Loss.apply(hidden, weight, labels - start, vocab_size - start, group, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    """`labels` and `columns` are relative to this rank's first vocabulary entry and may lie outside its shard."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        columns: int,
        group: dist.ProcessGroup,
        grad_enabled: bool,
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=_wide(hidden))
        lse = torch.empty_like(losses)
        wanted = ctx.needs_input_grad[:2] if grad_enabled and len(hidden) else (False, False)
        d_hidden, d_weight = _gradient_buffers(hidden, weight, *wanted)
        for chunk in _chunks(hidden, weight):
            logits = _logits(hidden[chunk], weight, columns)
            largest = logits.max(-1).values
            reduce_(largest, group, dist.ReduceOp.MAX)
            logits -= largest.unsqueeze(-1)
            target = _at_label(logits, labels[chunk])
            softmax = logits.exp_()
            sums = torch.stack([softmax.sum(-1), target])
            reduce_(sums, group)
            losses[chunk] = sums[0].log() - sums[1]
            lse[chunk] = sums[0].log() + largest
            softmax /= sums[0].unsqueeze(-1)
            _subtract_at_label(softmax, labels[chunk])
            _add_gradients(softmax, chunk, hidden, weight, d_hidden, d_weight)
            del logits, softmax  # free them before the next chunk's are allocated
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.columns = columns
        ctx.gradients = d_hidden, d_weight
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        if ctx.gradients is not None and len(hidden) and grad.stride(0) == 0:
            # Stride 0: an expanded scalar, as the backward of a sum returns it.
            computed, ctx.gradients = ctx.gradients, None  # scaled in place: a second backward recomputes them
            scaled = (None if x is None else _narrow_(x.mul_(grad[0]), weight.dtype) for x in computed)
            return *scaled, None, None, None, None
        d_hidden, d_weight = _gradient_buffers(hidden, weight, *ctx.needs_input_grad[:2])
        for chunk in _chunks(hidden, weight):
            softmax = _logits(hidden[chunk], weight, ctx.columns).sub_(lse[chunk].unsqueeze(-1)).exp_()
            _subtract_at_label(softmax, labels[chunk])
            _add_gradients(softmax.mul_(grad[chunk].unsqueeze(-1)), chunk, hidden, weight, d_hidden, d_weight)
            del softmax
        return d_hidden, None if d_weight is None else _narrow_(d_weight, weight.dtype), None, None, None, None


def _gradient_buffers(
    hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient buffers; None if not wanted. That of `hidden` is empty, in its dtype; that of `weight` is zeros, in
    float32 or wider if there are tokens to add up."""
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    dtype = _wide(weight) if len(hidden) else weight.dtype
    return d_hidden, torch.zeros_like(weight, dtype=dtype) if wants_weight else None


def _add_gradients(
    d_logits: Tensor, chunk: slice, hidden: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None
) -> None:
    d_logits = d_logits.to(weight.dtype)
    if d_hidden is not None:
        torch.mm(d_logits, weight, out=d_hidden[chunk])
    if d_weight is not None and d_weight.dtype == d_logits.dtype:
        d_weight.addmm_(d_logits.t(), hidden[chunk])
    elif d_weight is not None:
        entries = max(1, _BLOCK // d_weight.shape[1])
        for part, d_part in zip(d_weight.split(entries), d_logits.split(entries, dim=1), strict=True):
            part += d_part.t() @ hidden[chunk]


def _narrow_(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in a narrower dtype, in the first part of its own memory: a step may peak here, and need
    not hold both."""
    if wide.dtype == dtype:
        return wide
    flat = wide.view(-1)
    narrow = flat.view(dtype)[: len(flat)]
    for source, target in zip(flat.split(_BLOCK), narrow.split(_BLOCK), strict=True):
        target.copy_(source.to(dtype))  # overwrites numbers up to this block's last, which have been read
    return narrow.view(wide.shape)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Consecutive ranges of tokens; none without tokens, so that no collective is launched for them.

    A chunk's logits are at most 1/32 of all logits and no larger than `hidden`, but a chunk has at least 256 tokens.
    """
    count, width = hidden.shape
    each = max(_MIN_TOKENS, min(count // _MIN_CHUNKS, count * width // weight.shape[0]))
    return [slice(start, min(start + each, count)) for start in range(0, count, each)]


def _logits(hidden: Tensor, weight: Tensor, columns: int) -> Tensor:
    """[n, vocabulary shard], float32 or wider; -inf in padding columns."""
    logits = (hidden @ weight.t()).to(_wide(hidden))
    if columns < weight.shape[0]:
        logits[:, max(columns, 0) :] = float("-inf")
    return logits


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[n]: the label's logit where the label lies in this rank's vocabulary shard, else 0."""
    local = (labels >= 0) & (labels < logits.shape[1])
    picked = logits.gather(1, labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(local, picked, 0.0)


def _subtract_at_label(softmax: Tensor, labels: Tensor) -> None:
    """softmax -= one-hot(label), in place, where the label lies in this rank's vocabulary shard."""
    local = (labels >= 0) & (labels < softmax.shape[1])
    column = labels.clamp(0, softmax.shape[1] - 1).unsqueeze(1)
    softmax.scatter_add_(1, column, -local.to(softmax.dtype).unsqueeze(1))
