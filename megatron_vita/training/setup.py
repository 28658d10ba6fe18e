"""Everything one stage needs, built in the order that keeps it right, and taken down again."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_vita import checkpoint
from megatron_vita.checkpoint.history import DataSummary, SourceSummary
from megatron_vita.config import StageConfig
from megatron_vita.convert.identity import fingerprint
from megatron_vita.data.loading.loader import PackLoader, RankCoords
from megatron_vita.data.shards.manifest import Manifest
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.grads import finalize_grads
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups, forget_groups
from megatron_vita.training import weights as start
from megatron_vita.training.optimizer import build_optimizer

STARTED_FROM = "started_from"
"""Where RunState.extra keeps the digest of the weights a stage started from."""


@dataclass(kw_only=True)
class Parts:
    """The live parts of one stage on this rank."""

    groups: Groups
    models: list[VitaModel]
    """This rank's model chunks, bare: what checkpoints see."""
    wrapped: list[DistributedDataParallel]
    """The same chunks inside DistributedDataParallel: what the schedule runs."""
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


@dataclass(kw_only=True)
class Session(Parts):
    """The live parts of a stage that reads shards and stands somewhere."""

    stage: StageConfig
    state: checkpoint.RunState
    """Where the stage stands: iteration 0 at its start, or what the resumed checkpoint says."""

    def loader(self, *, valid: bool = False) -> PackLoader:
        """Global batches from where the stage stands (training), or from the start of the validation shards."""
        groups = self.groups
        coords = RankCoords(
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            cp_rank=groups.cp_rank,
            cp_size=groups.cp_size,
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
            sequence_parallel=groups.sequence_parallel,
            holds_tower=groups.first_stage and self.stage.model.vision is not None,
        )
        consumed = 0 if valid else self.state.consumed_packs
        return PackLoader(self.stage.data, self.stage.train, coords, consumed_packs=consumed, valid=valid)

    def close(self) -> None:
        """Free the model and its process groups, so that the next stage can be laid out anew. Every rank calls it; one
        that failed calls forget_groups instead."""
        self.models, self.wrapped = [], []
        self.optimizer = self.schedule = None
        gc.collect()  # DDP's buffers sit in reference cycles: without this two stages would be in memory at once
        destroy_groups()


def open_session(stage: StageConfig, *, weights: Path | None, resume: Path | None) -> Session:
    """Build groups, model, optimizer and state of a stage. Close the session before another is opened.

    Args:
        stage: the merged settings.
        weights: folder whose weights (and nothing else) the stage starts from; none: fresh weights.
        resume: checkpoint of this very stage to continue from, optimizer and data position included.
    """
    try:
        parts = build_parts(stage, weights=None if resume else weights, resume=resume is not None)
        if resume:
            state = checkpoint.load_training(resume, parts.models, parts.optimizer, parts.schedule)
        else:
            state = _fresh_state(stage, weights)
        return Session(**vars(parts), stage=stage, state=state)
    except BaseException:
        forget_groups()
        raise


def build_parts(stage: StageConfig, *, weights: Path | None = None, resume: bool = False) -> Parts:
    """Groups, model, data parallelism and optimizer of a stage, in the order that keeps them right.

    Weights are loaded before DistributedDataParallel copies parameters into its buffers, and the optimizer, which
    copies them once more, is built last.

    Args:
        stage: the merged settings.
        weights: checkpoint or Hugging Face folder to load the weights from; none: fresh weights.
        resume: the caller loads weights and optimizer right after, so none are drawn.
    """
    groups = build_groups(stage.parallel)
    models = build_model(stage, groups, fresh=weights is None and not resume)
    if weights is not None:
        start.load(weights, models)
    wrapped = wrap_models(stage, models)
    optimizer, schedule = build_optimizer(stage, wrapped)
    return Parts(groups=groups, models=models, wrapped=wrapped, optimizer=optimizer, schedule=schedule)


def wrap_models(stage: StageConfig, models: list[VitaModel]) -> list[DistributedDataParallel]:
    """Put the chunks into bf16 and data parallelism, and tell megatron-core how to finish gradients."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=models[0].config.params_dtype != torch.float64,  # which only checks run in
        overlap_grad_reduce=stage.parallel.overlap_grad_reduce,
        use_distributed_optimizer=True,
        average_in_collective=False,  # gradients are sums, divided once by the global number of labelled tokens
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
    """The state of a stage before its first step; it remembers which weights it started from, and what made them."""
    manifest = ShardSet(stage.data.data_path).manifest
    base_models, earlier = start.origin(weights) if weights else ({}, ())
    return checkpoint.RunState(
        stage=stage,
        iteration=0,
        consumed_packs=0,
        preprocess=manifest.spec if stage.model.vision else None,
        manifest_digest=manifest.digest,
        data=data_summary(stage.data.data_path, manifest),
        base_models=base_models,
        earlier=earlier,
        extra={STARTED_FROM: fingerprint(weights)} if weights else {},
    )


def data_summary(prefix: str, manifest: Manifest) -> DataSummary:
    """What a checkpoint remembers of the shard set at `prefix`."""
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
