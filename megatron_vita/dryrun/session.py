"""A dry run of one rank of one stage: build, step, report. Called in a process of its own (worker.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vita import device
from megatron_vita.config import StageConfig
from megatron_vita.data.loading.loader import RankCoords, StepBatches
from megatron_vita.dryrun import collectives as answered
from megatron_vita.dryrun.jobs import DryRunJob
from megatron_vita.dryrun.kinds import coords_of
from megatron_vita.dryrun.memory import Memory
from megatron_vita.dryrun.mode import DryRunMode, counting_pairs
from megatron_vita.dryrun.modules import ModulePath
from megatron_vita.dryrun.report import Report
from megatron_vita.dryrun.rows import rows_of
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel import block_kernels
from megatron_vita.parallel.groups import Groups
from megatron_vita.training.device_batch import prepare_batch
from megatron_vita.training.setup import ModelAndOptimizer, build_model_and_optimizer
from megatron_vita.training.step import train_step


def dry_run(job: DryRunJob, counted: answered.Collectives, *, fake: bool) -> Report:
    """Run `job.steps` training steps of one rank.

    Args:
        job: what to run; the stage's layout has been checked.
        counted: the installed collectives.
        fake: on fake CUDA tensors; else on the tensors of this process's device.

    Raises:
        FakeOperationError: an operation that a GPU would refuse.
    """
    began = time.monotonic()
    answered.start(job.rank, job.world_size)
    target = device.torch_device()
    stage = job.stage
    step = _step(stage, coords_of(stage, job.world_size, job.rank), job.world_size)
    labelled = int((step.micro_batches[0].labels >= 0).sum())
    modules = ModulePath()
    memory = Memory(target, modules)
    mode = DryRunMode(target, modules, memory, fake=fake)
    counted.buffer = lambda tensor: memory.part([tensor], "communication")
    faking = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with modules, memory, faking, mode, _scopes(modules, mode):
        built = build_model_and_optimizer(stage, resume=True)
        for number, chunk in enumerate(built.models):
            modules.name(chunk, f"chunk{number}." if len(built.models) > 1 else "")
        _name_parts(memory, built)
        build_peak = memory.highest
        groups = built.groups
        mode.labelled = labelled
        with _phases(built, counted, mode):
            for iteration in range(1, job.steps + 1):
                for one in (memory, mode, counted):
                    one.restart()
                before = memory.parts()
                _enter_phase("micro-batches", counted, mode)
                train_step(stage, groups, built.wrapped, built.optimizer, built.scheduler, step, iteration)
                _name_parts(memory, built)
        parameters = [one for chunk in built.models for one in chunk.parameters()]
        return Report(
            stage=stage.name,
            world_size=job.world_size,
            rank=job.rank,
            kind=kind_of(groups),
            parameters=sum(one.numel() for one in parameters),
            trainable=sum(one.numel() for one in parameters if one.requires_grad),
            documents=max(len(one.layout.documents) for one in step.micro_batches),
            tiles=max(len(one.tiles) for one in step.micro_batches),
            labelled=labelled if groups.last_stage else 0,
            micro_batches=len(step.micro_batches),
            micro_batches_in_step=stage.train.global_batch_size // (groups.dp_size * stage.train.micro_batch_size),
            build_peak=build_peak,
            before=before,
            peak=memory.peak.parts,
            after=memory.parts(),
            peak_bytes=memory.highest,
            peak_module=memory.peak.path,
            peak_operation=memory.peak.operation,
            peak_in_backward=memory.peak.backward,
            flops=mode.flops,
            collectives=counted.counted(_group_names(groups)),
            host_syncs=mode.host_syncs,
            operations=sum(mode.operations.values()),
            attention_calls=mode.attention_calls,
            seconds=time.monotonic() - began,
        )


def kind_of(groups: Groups) -> str:
    """What kind of rank this is, by its coordinates."""
    places = (("pp", groups.pp_rank, groups.pp_size), ("cp", groups.cp_rank, groups.cp_size),
              ("tp", groups.tp_rank, groups.tp_size), ("dp", groups.dp_rank, groups.dp_size))  # fmt: skip
    return " ".join(f"{name} {rank}/{size}" for name, rank, size in places)


def _group_names(groups: Groups) -> dict[Any, str]:
    names = ("dp", "dp_cp", "tp", "cp", "pp", "tp_cp")
    return {getattr(groups.collection, name): name for name in names if hasattr(groups.collection, name)}


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
    parallel = stage.parallel
    has = stage.train.global_batch_size // (parallel.data_parallel_size(world_size) * stage.train.micro_batch_size)
    return min(has, 2 * parallel.pipeline_model_parallel_size)


def _name_parts(memory: Memory, built: ModelAndOptimizer) -> None:
    """Say which storages are weights, gradients and optimizer state."""
    memory.part((one.data for chunk in built.models for one in chunk.parameters()), "weights")
    for chunk in built.wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            memory.part([buffer.param_data], "weights")
            memory.part([buffer.grad_data], "gradients")
    for optimizer in getattr(built.optimizer, "chained_optimizers", [built.optimizer]):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            continue
        masters = [one for group in inner.param_groups for one in group["params"]]
        weights = {one.untyped_storage()._cdata for chunk in built.models for one in chunk.parameters()}
        memory.part((one.data for one in masters if one.untyped_storage()._cdata not in weights), "optimizer")
        memory.part(
            (value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)),
            "optimizer",
        )


def _enter_phase(phase: str, counted: answered.Collectives, mode: DryRunMode) -> None:
    counted.phase = mode.phase = phase


@contextlib.contextmanager
def _phases(built: ModelAndOptimizer, counted: answered.Collectives, mode: DryRunMode) -> Iterator[None]:
    """Tell the phases of a step apart: its micro-batches, the reduction of gradients, the optimizer."""
    config = built.models[0].config
    finalize, update = config.finalize_model_grads_func, built.optimizer.step

    def in_phase(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            _enter_phase(phase, counted, mode)
            return function(*args, **kwargs)

        return inside

    config.finalize_model_grads_func = in_phase("gradients", finalize)
    built.optimizer.step = in_phase("optimizer", update)
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        built.optimizer.step = update


@contextlib.contextmanager
def _scopes(modules: ModulePath, mode: DryRunMode) -> Iterator[None]:
    """Name what is no module, count attention's FLOPs, and take the kernel that PyTorch would on a GPU."""
    replaced: list[tuple[Any, str, Any]] = [
        (VitaModel, "_visual_tokens", modules.scope("vision", VitaModel._visual_tokens)),
        (VitaModel, "_losses", modules.scope("language_model.output_layer", VitaModel._losses)),
        (block_kernels, "forward", counting_pairs(mode, block_kernels.forward, products=2)),
        (block_kernels, "backward", counting_pairs(mode, block_kernels.backward, products=5)),
        (F, "scaled_dot_product_attention", _sdpa),
    ]
    plain = [getattr(where, name) for where, name, _ in replaced]
    for where, name, new in replaced:
        setattr(where, name, new)
    try:
        yield
    finally:
        for (where, name, _), old in zip(replaced, plain, strict=True):
            setattr(where, name, old)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """PyTorch's choice on a GPU in half precision without a mask, flash attention; fake tensors get the unfused one."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: torch.Tensor = flash(query, key, value, scale=options.get("scale"))[0]
    return out
