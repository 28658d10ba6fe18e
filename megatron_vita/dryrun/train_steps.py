"""Training steps of one rank, dry."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_vita import device
from megatron_vita.config import StageConfig
from megatron_vita.core_optimizer import distributed_optimizers
from megatron_vita.data.loading.loader import RankCoords, StepBatches
from megatron_vita.dryrun.collectives import Collectives
from megatron_vita.dryrun.jobs import DryRunJob
from megatron_vita.dryrun.kinds import coords_of
from megatron_vita.dryrun.memory import Memory
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.rows import rows_of
from megatron_vita.dryrun.session import Watch
from megatron_vita.training.device_batch import prepare_batch
from megatron_vita.training.setup import ModelAndOptimizer, build_model_and_optimizer
from megatron_vita.training.step import train_step


def train(job: DryRunJob, counted: Collectives, *, fake: bool) -> Report:
    """Run `job.steps` training steps of one rank.

    Args:
        job: what to run; the stage's layout has been checked.
        counted: the installed collectives.
        fake: on fake CUDA tensors; else on the tensors of this process's device.

    Raises:
        FakeOperationError: an operation that a GPU would refuse.
    """
    stage = job.stage
    coords = coords_of(stage, job.world_size, job.rank)
    step = _step(stage, coords, job.world_size)
    labelled = int((step.micro_batches[0].labels >= 0).sum())
    with Watch(job, counted, fake=fake) as watch:
        setup = build_model_and_optimizer(stage, resume=True)
        watch.built(setup.models)
        _name_parts(watch.memory, setup)
        with _phases(setup, watch):
            for iteration in range(1, job.steps + 1):
                watch.restart()
                watch.phase("micro-batches")
                train_step(stage, setup.groups, setup.wrapped, setup.optimizer, setup.scheduler, step, iteration)
                _name_parts(watch.memory, setup)
        return watch.report(
            setup.groups,
            setup.models,
            documents=max(len(one.layout.documents) for one in step.micro_batches),
            tiles=max(len(one.tiles) for one in step.micro_batches),
            labelled=labelled if setup.groups.last_stage else 0,
            micro_batches=len(step.micro_batches),
            micro_batches_in_step=_micro_batches_in_step(stage, coords.dp_size),
        )


def _step(stage: StageConfig, coords: RankCoords, world_size: int) -> StepBatches:
    """As many micro-batches as fill the pipeline and reach its steady state."""
    vision = stage.model.vision
    rows = rows_of(stage, coords.dp_size, micro_batches_to_run(stage, world_size))
    sizes = (vision.tokens_per_tile, vision.image_size) if vision else (1, 1)
    batches: dict[int, Any] = {}
    for row in rows:
        if id(row) not in batches:
            batch = row.batch(coords, *sizes)
            prepared = prepare_batch(batch, coords, stage.parallel.cp_comm_type, device.torch_device())
            batches[id(row)] = dataclasses.replace(batch, prepared=prepared)
    micro_batches = [batches[id(row)] for row in rows]
    labels = sum(stop - start for row in rows for start, stop in row.answers)
    return StepBatches(
        micro_batches=micro_batches, pack_ids=(), sample_ids=(0,), num_labels=labels, failed=(), consumed_packs=0
    )


def micro_batches_to_run(stage: StageConfig, world_size: int) -> int:
    """Micro-batches of a dry run's step: two without a pipeline, else two for each of its ranks; no more than a step
    has. Later ones reach no higher peak."""
    has = _micro_batches_in_step(stage, stage.parallel.data_parallel_size(world_size))
    return min(has, 2 * stage.parallel.pipeline_model_parallel_size)


def _micro_batches_in_step(stage: StageConfig, dp_size: int) -> int:
    return stage.train.global_batch_size // (dp_size * stage.train.micro_batch_size)


def _name_parts(memory: Memory, built: ModelAndOptimizer) -> None:
    """Say which storages are weights, gradients and optimizer state."""
    for chunk in built.wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            memory.part([buffer.param_data], "weights")
            memory.part([buffer.grad_data], "gradients")
    weights = {one.untyped_storage()._cdata for chunk in built.models for one in chunk.parameters()}
    for optimizer in distributed_optimizers(built.optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            continue
        masters = [one for group in inner.param_groups for one in group["params"]]
        memory.part((one.data for one in masters if one.untyped_storage()._cdata not in weights), "optimizer")
        memory.part(
            (value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)),
            "optimizer",
        )


@contextlib.contextmanager
def _phases(built: ModelAndOptimizer, watch: Watch) -> Iterator[None]:
    """Tell the phases of a step apart: its micro-batches, the reduction of gradients, the optimizer."""
    config = built.models[0].config
    finalize, update = config.finalize_model_grads_func, built.optimizer.step

    def in_phase(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            watch.phase(phase)
            return watch.scope(phase, function)(*args, **kwargs)

        return inside

    config.finalize_model_grads_func = in_phase("gradients", finalize)
    built.optimizer.step = in_phase("optimizer", update)
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        built.optimizer.step = update
