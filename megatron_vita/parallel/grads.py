"""Gradients made whole after the last micro-batch: megatron-core's reductions, and ours for the tower."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vita.parallel.groups import tensor_parallel_sum_


def finalize_grads(
    model_chunks: list[Any],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
) -> None:
    """Finish the gradients of a step; give it to megatron-core as `TransformerConfig.finalize_model_grads_func`.

    megatron-core sums over data and context ranks, sums what sequence parallelism split, and divides by the labelled
    tokens of the global batch. The tower and the projector (marked `partial_over_tp`) are replicated over the tensor
    ranks while their tiles are spread over them, so each rank holds part of their gradient: summed here, in one place,
    with sequence parallelism or without.

    Args:
        model_chunks: DDP-wrapped chunks of this rank.
        num_tokens: labelled tokens this rank counted (summed over micro-batches), on the device; none: no division.
        pg_collection: process groups; none: megatron-core's current ones.
        force_all_reduce: passed on.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model_chunks, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    group = pg_collection.tp if pg_collection is not None else parallel_state.get_tensor_model_parallel_group()
    partial = [
        parameter.main_grad
        for chunk in model_chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, "partial_over_tp", False)
    ]
    tensor_parallel_sum_(partial, group)


class _ZeroGradients(torch.autograd.Function):
    """Nothing, of a given shape, that still owes a gradient to parameters."""

    @staticmethod
    def forward(ctx: Any, empty: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return empty.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.zeros_like(one) for one in ctx.saved_tensors)


def attach_zero_gradients(empty: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """`empty` (no elements), made part of the graph so that the trainable parameters get gradients of zero.

    A rank without tiles does not run its tower, yet its gradient buckets wait for every trainable parameter and its
    backward must join the exchange of features.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return empty
    out: torch.Tensor = _ZeroGradients.apply(empty, *trainable)
    return out
