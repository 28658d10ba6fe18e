"""Cross entropy over a vocabulary split over tensor-parallel ranks, on labelled rows only, a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.parallel.collectives import reduce_

_CHUNK_BYTES = 64 << 20
"""Logits held at once. Up to one chunk the softmax is kept for the backward; beyond, it is computed again."""


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
    return _Loss.apply(rows, weight, labels - start, vocab_size - start, group)


class _Loss(torch.autograd.Function):
    """`labels` and `columns` count from this rank's first vocabulary row and may lie outside its part."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, columns: int, group: dist.ProcessGroup
    ) -> Tensor:
        chunks = _chunks(len(rows), weight)
        losses = rows.new_empty(len(rows), dtype=_wide(rows))
        normaliser = torch.empty_like(losses)
        softmax = None
        for chunk in chunks:
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
            if len(chunks) == 1:
                softmax /= sums[0].unsqueeze(-1)
        ctx.save_for_backward(rows, weight, labels, normaliser, softmax if len(chunks) == 1 else None)
        ctx.columns = columns
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, normaliser, softmax = ctx.saved_tensors
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        d_rows = torch.empty_like(rows) if wants_rows else None
        d_weight = torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None
        for chunk in _chunks(len(rows), weight):
            if softmax is None:
                logits = _logits(rows[chunk], weight, ctx.columns)
                d_logits = logits.sub_(normaliser[chunk].unsqueeze(-1)).exp_()
            else:
                d_logits = softmax.clone()
            _subtract_at_label(d_logits, labels[chunk])
            d_logits = (d_logits * grad[chunk].unsqueeze(-1)).to(weight.dtype)
            if d_rows is not None:
                d_rows[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ rows[chunk]
        return d_rows, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    """Runs of rows whose logits fit in a chunk; none for no rows, so that nothing is exchanged for them."""
    each = max(1, _CHUNK_BYTES // (weight.shape[0] * _wide(weight).itemsize))
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


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
