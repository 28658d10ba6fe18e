"""One optimizer step, or one validation, with megatron-core's pipeline schedules."""

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
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model

from megatron_vita import device
from megatron_vita.config import StageConfig
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.errors import DataError
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.grads import divide_grads
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.tables import HostTables
from megatron_vita.training.device_batch import BatchTables, coords_of_groups, prepare_batch
from megatron_vita.training.faults import check_finite


def forward_backward(
    stage: StageConfig, model_chunks: Sequence[DistributedDataParallel], step: StepBatches, *, forward_only: bool
) -> torch.Tensor:
    """Run all micro-batches of this rank through megatron-core's pipeline schedule. All ranks call it.

    The gradients are then those of the mean token loss of the global batch, reduced over the ranks.

    Args:
        stage: sequence length and micro-batch size are used.
        model_chunks: this rank's chunks, wrapped in DistributedDataParallel.
        step: this rank's micro-batches, and the labelled tokens of the global batch.
        forward_only: no backward and no gradient reduction.

    Returns:
        float64 `[1]` on the device: sum of the token losses of this rank's micro-batches; 0 except on the last
        pipeline stage.
    """
    schedule = get_forward_backward_func()
    logs = schedule(
        forward_step_func=_forward_step,
        # Every chunk reads its inputs from its own Batch; pipeline stages exchange hidden states only.
        data_iterator=[iter(step.micro_batches) for _ in model_chunks],
        model=list(model_chunks),
        num_microbatches=len(step.micro_batches),
        seq_length=stage.data.seq_length * stage.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not forward_only:
        divide_grads(model_chunks, step.num_labels)
    total = torch.zeros(1, dtype=torch.float64, device=device.torch_device())
    for one in logs:
        total += one["loss_sum"]
    return total


def train_step(
    stage: StageConfig,
    groups: Groups,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    step: StepBatches,
    iteration: int,
) -> tuple[float | None, float | None]:
    """Forward, backward and optimizer step for one global batch. All ranks call it.

    Args:
        stage: the merged settings of the training stage.
        groups: coordinates and process groups of this rank.
        model_chunks: this rank's chunks, wrapped in DistributedDataParallel.
        optimizer: of these chunks.
        scheduler: its learning-rate scheduler.
        step: this rank's micro-batches, failed samples masked.
        iteration: number of the step, for error messages.

    Returns:
        Mean loss over the labelled tokens of the global batch, and the gradient norm before clipping. Both are None if
        the global batch has no labelled token: then only the scheduler advances.

    Raises:
        NotFiniteError: the loss or the gradient norm is NaN or infinite; on every rank.
    """
    for chunk in model_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss_sum = forward_backward(stage, model_chunks, step, forward_only=False)
    scheduler.step(1)
    if step.num_labels == 0:
        return None, None
    loss = _mean_loss(groups, loss_sum, step.num_labels)
    check = partial(check_finite, stage=stage.name, iteration=iteration, sample_ids=step.sample_ids)
    check("loss", loss)
    _, grad_norm, _ = optimizer.step()
    norm = float(grad_norm or 0.0)
    check("gradient norm", norm)
    return loss, norm


def validate(
    stage: StageConfig, groups: Groups, model_chunks: Sequence[DistributedDataParallel], steps: Iterator[StepBatches]
) -> float:
    """Mean loss over the labelled tokens of all global batches in `steps`, without gradients. All ranks call it.

    Raises:
        DataError: the batches have no labelled token.
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


def model_inputs(batch: Batch, vita: VitaModel) -> dict[str, Any]:
    """Convert a Batch, prepared or not, to the keyword arguments of a chunk's forward, with tensors on its device."""
    target = device.torch_device()
    prepared: HostTables[BatchTables] | None = batch.prepared
    if prepared is None:
        coords = coords_of_groups(vita.groups, tower=vita.vision_model is not None)
        prepared = prepare_batch(batch, coords, vita.config.cp_comm_type, target)
    tables = prepared.to(target)
    tiles = batch.tiles if vita.pre_process else batch.tiles[:0]  # only the first virtual stage encodes them
    return {
        **{field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)},
        "tiles": tiles.to(target, non_blocking=True),
        "layout": batch.layout,
        "routes": batch.routes,
    }


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """`forward_step_func` of megatron-core's schedules: (output tensor, loss function) of the next micro-batch."""
    vita = unwrap_model(model, (DistributedDataParallel, Float16Module))
    return model(**model_inputs(next(batches), vita)), _token_loss


def _token_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss function of megatron-core's schedules under calculate_per_token_loss.

    Args:
        losses: float32 or wider `[labelled tokens of this rank]`.

    Returns:
        (sum of losses, int32 number of labelled tokens, values to log). megatron-core sums the numbers for
        its own division of gradients, which `divide_grads` replaces.
    """
    loss_sum = losses.sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int)  # on the CPU, as megatron-core's own of other stages
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach().double()}


def _mean_loss(groups: Groups, loss_sum: torch.Tensor, num_labels: int) -> float:
    """All-reduce the loss sums over the world, counting tensor-parallel replicas once, and divide by num_labels."""
    counted = loss_sum if groups.last_stage and groups.tp_rank == 0 else torch.zeros_like(loss_sum)
    dist.all_reduce(counted)
    return counted.item() / num_labels
