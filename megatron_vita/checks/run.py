"""Run one case on this rank: build it as training does, take one step, and compare with the reference."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vita.checks.batches import step_batches
from megatron_vita.checks.compare import NEGLIGIBLE, Comparison, Outcome, merge
from megatron_vita.checks.reference import Reference, make_reference
from megatron_vita.checks.tiny import make_packs
from megatron_vita.config import StageConfig
from megatron_vita.models.build import build_model, global_name, local_shard
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups
from megatron_vita.training.optimizer import build_optimizer
from megatron_vita.training.setup import wrap_models
from megatron_vita.training.step import forward_backward


def run_stage(stage: StageConfig, images: str, dtype: torch.dtype) -> Outcome:
    """Take one step of a stage over tiny packs, on every rank of the world, after `init_distributed`.

    Args:
        stage: settings, read as training reads them.
        images: where tiles stand, see tiny.IMAGES.
        dtype: of the parameters. float64 takes a step of SGD (megatron-core's optimizers are float32), the others a
            clipped step of training's AdamW.

    Returns:
        the differences, merged over all ranks; the same on each.
    """
    reference = make_reference(stage.model, stage.train, images, stage.data.reset_per_document, dtype)
    groups = build_groups(stage.parallel)
    where = f"tp rank {groups.tp_rank}, cp {groups.cp_rank}, pp {groups.pp_rank}, dp {groups.dp_rank}"
    comparison = Comparison(dtype, tuple(reference.weights), where)
    _one_step(stage, images, dtype, groups, reference, comparison)
    gc.collect()  # DDP's buffers sit in reference cycles, and cases come one after another
    outcomes: list[Outcome] = [comparison.outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, comparison.outcome)
    destroy_groups()
    return merge(outcomes, reference.weights)


def _one_step(
    stage: StageConfig,
    images: str,
    dtype: torch.dtype,
    groups: Groups,
    reference: Reference,
    comparison: Comparison,
) -> None:
    """Forward, backward, comparison of gradients, update, comparison of weights."""
    if stage.model.vision is not None:  # one tile an encoder micro-batch: ranks take several, one or none
        vision = dataclasses.replace(stage.model.vision, tiles_per_batch=1)
        stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, vision=vision))
    models = build_model(stage, groups, dtype=dtype)
    for name, model, parameter in _named(models):
        with torch.no_grad():
            parameter.copy_(_mine(reference.weights[name], parameter, name, model))
    wrapped = wrap_models(stage, models)
    optimizer, schedule = (None, None) if dtype == torch.float64 else build_optimizer(stage, wrapped)
    step = step_batches(stage, groups, make_packs(stage.model, stage.train.global_batch_size, images))
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()
    loss_sum = forward_backward(stage, wrapped, step, forward_only=False)
    loss_sum *= groups.last_stage and groups.tp_rank == 0
    dist.all_reduce(loss_sum)
    comparison.loss(loss_sum.item() / step.num_labels, reference.loss)
    _gather_gradients(wrapped)
    _compare_gradients(models, reference, comparison)
    settings = stage.optimizer
    if optimizer is None or schedule is None:
        _sgd(models, settings.lr)
        expected = reference.after_sgd(settings.lr)
    else:
        schedule.step(1)
        optimizer.step()
        expected = reference.after_adamw(settings)
    _compare_weights(models, reference, expected, comparison, None if optimizer is None else settings.lr)


def _gather_gradients(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Gather `main_grad` on every rank: under the distributed optimizer a data rank has the sum of its shard only."""
    for chunk in wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _compare_gradients(models: Sequence[VitaModel], reference: Reference, comparison: Comparison) -> None:
    for name, model, parameter in _named(models):
        comparison.holds(name)
        if parameter.requires_grad != (name in reference.grads):
            comparison.holds(name, "trains, but is frozen" if parameter.requires_grad else "does not train")
        elif parameter.requires_grad:
            whole = reference.grads[name]
            comparison.gradient(name, _gradient(parameter), _mine(whole, parameter, name, model), whole)


def _sgd(models: Sequence[VitaModel], lr: float) -> None:
    trained = [parameter for _, _, parameter in _named(models) if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = _gradient(parameter)
    if trained:
        torch.optim.SGD(trained, lr=lr).step()


def _compare_weights(
    models: Sequence[VitaModel],
    reference: Reference,
    expected: dict[str, Tensor],
    comparison: Comparison,
    adam_lr: float | None,
) -> None:
    """Compare trained weights with the reference's after its step; frozen ones must be unchanged.

    `adam_lr`: differences are counted in rates, where the gradient counts; none: relative to the tensor's largest.
    """
    for name, model, parameter in _named(models):
        if name not in expected:
            before = _mine(reference.weights[name], parameter, name, model)
            if not torch.equal(parameter.detach().cpu(), before.to(parameter.dtype)):
                comparison.holds(name, "is frozen, but moved")
            continue
        gradient = reference.grads[name].abs()
        counts = gradient > NEGLIGIBLE * gradient.max() if adam_lr else torch.ones_like(gradient, dtype=torch.bool)
        unit = adam_lr or float(expected[name].abs().max())
        part, mask = (_mine(whole, parameter, name, model) for whole in (expected[name], counts))
        comparison.weight(name, parameter, part, mask.bool(), unit)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Gradient of a parameter, as DistributedDataParallel stores it."""
    return parameter.main_grad  # type: ignore[attr-defined]


def _named(models: Sequence[VitaModel]) -> Iterator[tuple[str, VitaModel, torch.nn.Parameter]]:
    """Every parameter of this rank by checkpoint key, with its model chunk."""
    for model in models:
        for name, parameter in model.named_parameters():
            yield global_name(name, model), model, parameter


def _mine(whole: Tensor, parameter: torch.nn.Parameter, name: str, model: VitaModel) -> Tensor:
    """This rank's shard of a tensor."""
    return local_shard(whole, parameter, name, model.model, model.groups)
