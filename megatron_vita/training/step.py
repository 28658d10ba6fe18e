"""One optimizer step and one validation, through megatron-core's pipeline schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_vita import device
from megatron_vita.config import StageConfig
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.errors import DataError
from megatron_vita.parallel.groups import Groups
from megatron_vita.training.faults import refuse_non_finite


def forward_backward(
    stage: StageConfig, model_chunks: Sequence[DistributedDataParallel], step: StepBatches, *, forward_only: bool
) -> torch.Tensor:
    """Run every micro-batch of this rank through the schedule that fits the pipeline.

    Returns:
        float64 `[1]`, on the device: the sum of token losses of this rank's micro-batches; 0 on other pipeline stages.
    """
    schedule = get_forward_backward_func()
    logs = schedule(
        forward_step_func=_forward_step,
        # Every chunk takes its input from its own Batch: no stage is told anything by another but hidden states.
        data_iterator=[iter(step.micro_batches) for _ in model_chunks],
        model=list(model_chunks),
        num_microbatches=len(step.micro_batches),
        seq_length=stage.data.seq_length * stage.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    total = torch.zeros(1, dtype=torch.float64, device=device.torch_device())
    for one in logs:
        total += one["loss_sum"]
    return total


def train_step(
    stage: StageConfig,
    groups: Groups,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    step: StepBatches,
    iteration: int,
) -> tuple[float | None, float | None]:
    """Forward, backward and update for one global batch.

    Returns:
        Mean loss over the global batch's labelled tokens and the gradient norm before clipping; both none where the
        batch carries no label at all: then no weight and no optimizer state moves, only the schedule.

    Raises:
        VitaError: the loss or the gradient norm is not finite.
    """
    for chunk in model_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss_sum = forward_backward(stage, model_chunks, step, forward_only=False)
    schedule.step(1)
    if step.num_labels == 0:
        return None, None
    loss = _mean_loss(groups, loss_sum, step.num_labels)
    check = partial(refuse_non_finite, stage=stage.name, iteration=iteration, sample_ids=step.sample_ids)
    check("loss", loss)
    _, grad_norm, _ = optimizer.step()
    norm = float(grad_norm or 0.0)
    check("gradient norm", norm)
    return loss, norm


def validate(
    stage: StageConfig, groups: Groups, model_chunks: Sequence[DistributedDataParallel], steps: Iterator[StepBatches]
) -> float:
    """Mean loss over the labelled tokens of `steps` global batches, without gradients.

    Raises:
        DataError: there is no labelled token.
    """
    for chunk in model_chunks:
        chunk.eval()
    loss_sum = torch.zeros(1, dtype=torch.float64, device=device.torch_device())
    num_labels = 0
    with torch.no_grad():
        for step in steps:
            loss_sum += forward_backward(stage, model_chunks, step, forward_only=True)
            num_labels += step.num_labels
    for chunk in model_chunks:
        chunk.train()
    if not num_labels:
        raise DataError("the validation shards hold no label, so there is no loss to measure. Give others.")
    return _mean_loss(groups, loss_sum, num_labels)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """A Batch as VitaModel.forward's keyword arguments, its tensors on this rank's device."""
    place = device.torch_device()
    return {
        "tokens": batch.tokens.to(place, non_blocking=True),
        "labels": batch.labels.to(place, non_blocking=True),
        "positions": batch.positions.to(place, non_blocking=True),
        "tiles": batch.tiles.to(place, non_blocking=True),
        "layout": batch.layout,
        "routes": batch.routes,
    }


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """What megatron-core's schedules call for each micro-batch: (output, loss function)."""
    batch = next(batches)
    if not get_attr_wrapped_model(model, "pre_process"):  # a later virtual stage of the rank that encodes the tiles
        batch = dataclasses.replace(batch, tiles=batch.tiles[:0])
    return model(**model_inputs(batch)), _token_loss


def _token_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of token losses, labelled tokens of this rank, log) from per-row losses float32 `[labelled rows]`.

    megatron-core divides by the labelled tokens of all ranks and micro-batches (calculate_per_token_loss), so every
    labelled token of the global batch weighs the same.
    """
    loss_sum = losses.sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach().double()}


def _mean_loss(groups: Groups, loss_sum: torch.Tensor, num_labels: int) -> float:
    """Sum the rank's losses over the world, taking the copies on tensor-parallel ranks once, and divide."""
    counted = loss_sum if groups.last_stage and groups.tp_rank == 0 else torch.zeros_like(loss_sum)
    dist.all_reduce(counted)
    return counted.item() / num_labels
