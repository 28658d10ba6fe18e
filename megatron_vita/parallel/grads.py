"""Gradient reductions after the last micro-batch: megatron-core's, and one over tensor ranks for the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_vita.parallel.groups import tensor_parallel_sum_


def finalize_grads(
    model_chunks: list[Any],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
) -> None:
    """Reduce the gradients of a step; set as `TransformerConfig.finalize_model_grads_func`, called by the schedules.

    megatron-core's finalize_model_grads reduces over data and context ranks and all-reduces the gradients that sequence
    parallelism splits. Parameters marked `partial_over_tp` are then summed over the tensor ranks: the vision tower and
    the projector are replicated over them while each rank encodes other tiles, so a rank has a partial gradient, with
    or without sequence parallelism.

    The gradients are left sums of token losses' gradients. megatron-core would divide them by the labelled tokens of
    the global batch, which it sums over the ranks on the device and reads: the host would wait for the whole backward.
    The loader knows that number, and `divide_grads` divides.

    Args:
        model_chunks: DDP-wrapped model chunks of this rank.
        num_tokens: labelled tokens of this rank, on the device; not used.
        pg_collection: process groups; None: megatron-core's global ones.
        force_all_reduce: passed to megatron-core.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model_chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    group = pg_collection.tp if pg_collection is not None else parallel_state.get_tensor_model_parallel_group()
    partial = [
        parameter.main_grad
        for chunk in model_chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, "partial_over_tp", False)
    ]
    tensor_parallel_sum_(partial, group)


def divide_grads(model_chunks: Sequence[Any], num_labels: int) -> None:
    """Divide a step's gradients by the labelled tokens of the global batch, after `finalize_grads`; by 1 if it has
    none."""
    for chunk in model_chunks:
        chunk.scale_gradients(1.0 / max(num_labels, 1))


class _ZeroGradients(torch.autograd.Function):
    """Copies an empty tensor; its backward gives every parameter a zero gradient."""

    @staticmethod
    def forward(ctx: Any, empty: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return empty.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def attach_zero_gradients(empty: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Connect an empty tensor to the autograd graph so that the trainable parameters get zero gradients.

    VitaModel calls it on a rank without tiles, which does not run the vision tower: its DDP gradient buckets still wait
    for every trainable parameter, and its backward must join the all-to-all of visual tokens.

    Args:
        empty: a tensor without elements.
        parameters: trainable and frozen ones; the frozen ones are ignored.

    Returns:
        `empty` itself without trainable parameters or without grad mode, else a copy that requires grad.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return empty
    out: torch.Tensor = _ZeroGradients.apply(empty, *trainable)
    return out
