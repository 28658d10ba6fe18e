"""Set-up and tear-down of a training stage: process groups, model, DDP, optimizer, state."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_vita import checkpoint, device
from megatron_vita.checkpoint.history import DataSummary, SourceSummary
from megatron_vita.config import StageConfig
from megatron_vita.convert.opening import DECODER
from megatron_vita.data.loading.loader import PackLoader
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import DamagedError
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.grads import finalize_grads
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups, forget_groups
from megatron_vita.training import weights as start
from megatron_vita.training.device_batch import coords_of_groups, prepare_batch
from megatron_vita.training.optimizer import build_optimizer

STARTED_FROM = "started_from"
"""Key of RunState.extra: digest of the weights that a stage started from."""


@dataclass(kw_only=True)
class ModelAndOptimizer:
    """Process groups, model chunks, optimizer and scheduler of one stage on this rank."""

    groups: Groups
    models: list[VitaModel]
    """This rank's model chunks, unwrapped, as checkpoints use them."""
    wrapped: list[DistributedDataParallel]
    """The same chunks wrapped in DistributedDataParallel, as the pipeline schedules use them."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


@dataclass(kw_only=True)
class Session(ModelAndOptimizer):
    """A training stage in progress: model, optimizer, settings and training state. Created by `open_session`."""

    stage: StageConfig
    state: checkpoint.RunState
    """Training progress: iteration 0 at the start of the stage, or that of the resumed checkpoint."""
    resumed: Path | None = None
    """The checkpoint that the stage goes on from."""

    def loader(self, *, valid: bool = False) -> PackLoader:
        """Loader of this rank's batches, from state.consumed_packs on, or from the start of the validation shards."""
        coords = coords_of_groups(self.groups, tower=self.stage.model.vision is not None)
        consumed = 0 if valid else self.state.consumed_packs
        comm_type = self.stage.parallel.cp_comm_type
        return PackLoader(
            self.stage.data,
            self.stage.train,
            coords,
            consumed_packs=consumed,
            valid=valid,
            prepare=partial(prepare_batch, coords=coords, comm_type=comm_type, target=device.torch_device()),
            allocate=device.page_locked,
        )

    def close(self) -> None:
        """Free model and optimizer and destroy the process groups, so that the next stage may use another layout.

        Collective over the world; a rank that failed calls `forget_groups` instead.
        """
        self.models, self.wrapped = [], []
        self.optimizer = self.scheduler = None
        gc.collect()  # DDP's buffers are in reference cycles: otherwise two stages would be in memory at once
        destroy_groups()


def open_session(stage: StageConfig, *, weights: Path | None, resume: Path | None) -> Session:
    """Set up a stage: process groups, model, optimizer, state. All ranks call it; close it before opening another.

    Args:
        stage: the merged settings of the stage.
        weights: checkpoint or Hugging Face folder of the initial weights; None: random initialisation. Ignored with
            `resume`.
        resume: checkpoint of this stage to continue from: weights, optimizer, scheduler and data position.

    Raises:
        ConfigError: settings that do not fit the world size or the installation.
        DamagedError: a checkpoint is damaged; on every rank.
        CheckpointError: a folder that does not fit the model.
    """
    try:
        setup = build_model_and_optimizer(stage, weights=None if resume else weights, resume=resume is not None)
        if resume:
            state = checkpoint.load_training(resume, setup.models, setup.optimizer, setup.scheduler)
            state = dataclasses.replace(state, stage=stage)  # paths, layout and rates may be others than when it began
        else:
            state = _fresh_state(stage, weights)
        return Session(**vars(setup), stage=stage, state=state, resumed=resume)
    except DamagedError:
        destroy_groups()  # every rank is here, and the stage is opened again
        raise
    except BaseException:
        forget_groups()
        raise


def build_model_and_optimizer(
    stage: StageConfig, *, weights: Path | None = None, resume: bool = False
) -> ModelAndOptimizer:
    """Build process groups, model, DDP and optimizer of a stage. All ranks call it.

    Weights are loaded before DistributedDataParallel copies the parameters into its buffers and before the optimizer
    copies them into master weights.

    Args:
        stage: the merged settings of the stage.
        weights: checkpoint or Hugging Face folder of the initial weights; None: random initialisation.
        resume: the caller loads weights and optimizer afterwards, so the weights stay uninitialised.
    """
    groups = build_groups(stage.parallel)
    models = build_model(stage, groups, fresh=weights is None and not resume)
    if weights is not None:
        start.load(weights, models)
    wrapped = wrap_models(stage, models)
    optimizer, scheduler = build_optimizer(stage, wrapped)
    return ModelAndOptimizer(groups=groups, models=models, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler)


def wrap_models(stage: StageConfig, models: list[VitaModel]) -> list[DistributedDataParallel]:
    """Wrap model chunks in Float16Module (train.bf16) and DistributedDataParallel; set finalize_model_grads_func."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=models[0].config.params_dtype != torch.float64,  # float64 is used by checks only
        overlap_grad_reduce=stage.parallel.overlap_grad_reduce,
        use_distributed_optimizer=True,
        average_in_collective=False,  # gradients are sums; forward_backward divides by the labelled tokens
    )
    wrapped: list[DistributedDataParallel] = []
    for model in models:
        inner = Float16Module(model.config, model) if stage.train.bf16 else model
        wrapped.append(DistributedDataParallel(model.config, settings, inner))
    config = models[0].config
    config.finalize_model_grads_func = finalize_grads
    if stage.parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = hooks[0] if len(hooks) == 1 else hooks
    return wrapped


def _fresh_state(stage: StageConfig, weights: Path | None) -> checkpoint.RunState:
    """RunState of a stage before its first step, with digest and history of the weights it starts from."""
    manifest = ShardSet(stage.data.data_path).manifest
    base_models, earlier = start.origin(weights) if weights else ({}, ())
    extra: dict[str, Any] = {}
    if weights:
        extra[STARTED_FROM] = start.identity(weights)
        if (family := start.decoder_family(weights)) is not None:
            extra[DECODER] = family
    return checkpoint.RunState(
        stage=stage,
        iteration=0,
        consumed_packs=0,
        preprocess=manifest.spec if stage.model.vision else None,
        manifest_digest=manifest.digest,
        data=data_summary(stage.data.data_path, manifest),
        base_models=base_models,
        earlier=earlier,
        extra=extra,
    )


def data_summary(prefix: str, manifest: Manifest) -> DataSummary:
    """Summary of the shard set at `prefix` that checkpoints store (for the model card)."""
    return DataSummary(
        name=Path(prefix).name,
        seq_length=manifest.seq_length,
        layout=manifest.layout,
        sources=tuple(
            SourceSummary(
                name=one.name,
                read=one.read,
                used=one.used,
                rejected=sum(one.rejected.values()),
                truncated=one.truncated,
                tokens=one.tokens,
                tiles=one.tiles,
            )
            for one in manifest.sources
        ),
    )
