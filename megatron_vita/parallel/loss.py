"""Cross entropy over a vocabulary split over tensor-parallel ranks, on labelled rows only, a chunk at a time.

The gradient of -log softmax is known as soon as the softmax is, so it is taken in the forward, while a chunk's logits
are there: three matrix products in all, as without chunks, and never more than one chunk of logits. That serves where
all rows weigh the same in what is differentiated, as in the sum of a training step; otherwise the backward computes the
logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import reduce_

_MIN_ROWS = 256
"""Rows of a chunk: fewer would read the head from memory more often than the products take."""
_MAX_SHARE = 32
"""A chunk's logits are at most one part in so many of all the rows' logits."""


def vocab_parallel_loss(
    rows: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Loss of every row: -log softmax(rows @ weight.T)[label], in float32 or wider.

    Neither the logits of unlabelled tokens nor all the logits of labelled ones ever exist at once. The gradient of
    `rows` is this rank's share (its part of the vocabulary): sum it over the group.

    Args:
        rows: [n, h], the hidden states that have a label; n may be 0.
        weight: [padded vocabulary / group size, h], this rank's part of the head.
        labels: int64 [n], in 0..vocab_size - 1.
        vocab_size: columns that mean something; padding columns take no part in the softmax.
        group: the tensor-parallel ranks.
    """
    start = group.rank() * weight.shape[0]
    return _Loss.apply(rows, weight, labels - start, vocab_size - start, group, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    """`labels` and `columns` count from this rank's first vocabulary row and may lie outside its part."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        columns: int,
        group: dist.ProcessGroup,
        differentiated: bool,
    ) -> Tensor:
        losses = rows.new_empty(len(rows), dtype=_wide(rows))
        normaliser = torch.empty_like(losses)
        wanted = ctx.needs_input_grad[:2] if differentiated else (False, False)
        d_rows, d_weight = _no_gradients(rows, weight, *wanted)
        for chunk in _chunks(rows, weight):
            logits = _logits(rows[chunk], weight, columns)
            largest = logits.max(-1).values
            reduce_(largest, group, dist.ReduceOp.MAX)
            logits -= largest.unsqueeze(-1)
            target = _at_label(logits, labels[chunk])
            softmax = logits.exp_()
            sums = torch.stack([softmax.sum(-1), target])
            reduce_(sums, group)
            losses[chunk] = sums[0].log() - sums[1]
            normaliser[chunk] = sums[0].log() + largest
            softmax /= sums[0].unsqueeze(-1)
            _subtract_at_label(softmax, labels[chunk])
            _add_gradients(softmax, chunk, rows, weight, d_rows, d_weight)
            del logits, softmax  # before the next chunk's are made
        ctx.save_for_backward(rows, weight, labels, normaliser)
        ctx.columns = columns
        ctx.gradients = d_rows, d_weight
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, normaliser = ctx.saved_tensors
        if ctx.gradients is not None and len(rows) and grad.stride(0) == 0:
            # One number for all rows, as a sum's backward hands it down.
            known, ctx.gradients = ctx.gradients, None  # scaled in place: a second backward computes them again
            scaled = (None if one is None else one.mul_(grad[0]).to(weight.dtype) for one in known)
            return *scaled, None, None, None, None
        d_rows, d_weight = _no_gradients(rows, weight, *ctx.needs_input_grad[:2])
        for chunk in _chunks(rows, weight):
            softmax = _logits(rows[chunk], weight, ctx.columns).sub_(normaliser[chunk].unsqueeze(-1)).exp_()
            _subtract_at_label(softmax, labels[chunk])
            _add_gradients(softmax.mul_(grad[chunk].unsqueeze(-1)), chunk, rows, weight, d_rows, d_weight)
            del softmax
        return d_rows, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _no_gradients(
    rows: Tensor, weight: Tensor, wants_rows: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Where the gradients of rows (their type) and of the head (float32 or wider) are collected."""
    d_rows = torch.empty_like(rows) if wants_rows else None
    return d_rows, torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None


def _add_gradients(
    d_logits: Tensor, chunk: slice, rows: Tensor, weight: Tensor, d_rows: Tensor | None, d_weight: Tensor | None
) -> None:
    d_logits = d_logits.to(weight.dtype)
    if d_rows is not None:
        torch.mm(d_logits, weight, out=d_rows[chunk])
    if d_weight is not None and d_weight.dtype == d_logits.dtype:
        d_weight.addmm_(d_logits.t(), rows[chunk])
    elif d_weight is not None:
        d_weight += d_logits.t() @ rows[chunk]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(rows: Tensor, weight: Tensor) -> list[slice]:
    """Runs of rows; none for no rows, so that nothing is exchanged for them.

    A chunk's logits are at most 1/32 of all, and no larger than the rows themselves, unless that were under 256 rows.
    """
    count, width = rows.shape
    each = max(_MIN_ROWS, min(count // _MAX_SHARE, count * width // weight.shape[0]))
    return [slice(start, min(start + each, count)) for start in range(0, count, each)]


def _logits(rows: Tensor, weight: Tensor, columns: int) -> Tensor:
    """[n, local vocabulary] in float32 or wider; padding columns are minus infinity."""
    logits = (rows @ weight.t()).to(_wide(rows))
    if columns < weight.shape[0]:
        logits[:, max(columns, 0) :] = float("-inf")
    return logits


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] logit at the label where it lies in this rank's part, else 0."""
    mine = (labels >= 0) & (labels < logits.shape[1])
    picked = logits.gather(1, labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(mine, picked, 0.0)


def _subtract_at_label(softmax: Tensor, labels: Tensor) -> None:
    """softmax -= one-hot(label), where the label lies in this rank's part."""
    mine = (labels >= 0) & (labels < softmax.shape[1])
    column = labels.clamp(0, softmax.shape[1] - 1).unsqueeze(1)
    softmax.scatter_add_(1, column, -mine.to(softmax.dtype).unsqueeze(1))
