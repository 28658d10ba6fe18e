"""A tiny model in any layout, and an optimizer step that needs no data."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, OptimizerConfig, ParallelConfig, StageConfig, TrainConfig, VisionConfig
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import Groups, build_groups
from megatron_vita.training.optimizer import build_optimizer

VISION = VisionConfig(
    num_layers=2, hidden_size=20, ffn_hidden_size=28, num_attention_heads=2, image_size=16, patch_size=4
)
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=37,
    vision=VISION,
)
"""The odd vocabulary is padded differently at TP 1 and TP 2."""


def stage(
    parallel: ParallelConfig | None = None, *, model: ModelConfig = MODEL, seed: int = 1, **train: Any
) -> StageConfig:
    return StageConfig(
        name="tiny",
        model=model,
        parallel=parallel or ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, lr_warmup_fraction=0.0),
        train=TrainConfig(seed=seed, train_iters=10, **train),
    )


def state(settings: StageConfig, iteration: int = 1, **more: Any) -> checkpoint.RunState:
    return checkpoint.RunState(stage=settings, iteration=iteration, **more)


class Trainer:
    """One rank's model, optimizer and schedule."""

    def __init__(self, settings: StageConfig) -> None:
        self.stage = settings
        self.groups: Groups = build_groups(settings.parallel)
        self.models = build_model(settings, self.groups)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.wrapped = [DistributedDataParallel(one.config, ddp, one) for one in self.models]
        self.optimizer, self.scheduler = build_optimizer(settings, self.wrapped)

    def step(self) -> float:
        """Step along a gradient that each weight has by itself, so that layouts do not matter (padding has
        none); returns the global norm."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(torch.sin(7 * parameter.detach()))  # type: ignore[attr-defined]
        self.scheduler.step(1)
        _, norm, _ = self.optimizer.step()
        return float(norm)


def smaller(**changes: Any) -> ModelConfig:
    """Another shape."""
    return dataclasses.replace(MODEL, **changes)
