"""megatron-core's distributed optimizer with AdamW, its parameter groups and its learning-rate scheduler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_vita import core_optimizer
from megatron_vita.config import StageConfig


def build_optimizer(
    stage: StageConfig, model_chunks: Sequence[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build optimizer and learning-rate scheduler of one stage. All ranks call it.

    Args:
        stage: sections `optimizer` and `train` (bf16, train_iters) are used.
        model_chunks: this rank's model chunks, wrapped in megatron-core's DistributedDataParallel.

    Returns:
        The optimizer, and a scheduler that counts optimizer steps: call `.step(1)` before each optimizer step. Step 1
        then has the first rate of the warmup (above 0), the last step has min_lr.
    """
    core_optimizer.use_foreach_kernels()
    settings = stage.optimizer
    config = CoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=stage.train.bf16,
        params_dtype=torch.bfloat16 if stage.train.bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, list(model_chunks), config_overrides=_parameter_overrides(stage))
    iters = stage.train.train_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps(stage),
        lr_decay_steps=iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
    return optimizer, scheduler


def warmup_steps(stage: StageConfig) -> int:
    """Steps over which the learning rate rises to its peak; at least one step is left for the schedule after them."""
    iters = stage.train.train_iters
    return min(round(stage.optimizer.lr_warmup_fraction * iters), iters - 1)


def tower_lr_multiplier(name: str, *, num_layers: int, mult: float, decay_rate: float) -> float:
    """Layer-wise learning-rate decay: multiplier of a vision tower parameter, as in Long-VITA's stage 2.

    mult * decay_rate ** (L + 1 - depth), where depth is 0 for position and patch embedding, i + 1 for block i, and L +
    1 for all other parameters of the tower (the class token). With mult 0.1, decay_rate 0.9 and 24 layers: 0.00718 for
    depth 0, 0.09 for the last block.

    Args:
        name: the parameter's name, containing `vision_model.`.
        num_layers: L, number of blocks of the tower.
        mult: optimizer.vision_model_lr_mult.
        decay_rate: optimizer.vision_model_lr_decay_rate.
    """
    block = re.search(r"vision_model\.decoder\.layers\.(\d+)\.", name)
    if block:
        depth = int(block.group(1)) + 1
    elif "position_embeddings" in name or "conv1" in name:
        depth = 0
    else:
        depth = num_layers + 1
    return mult * decay_rate ** (num_layers + 1 - depth)


def _parameter_overrides(stage: StageConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Parameter groups: no weight decay for biases and 1-D parameters; the vision tower's learning rates."""
    one_dimensional = ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1)
    overrides = {ParamKey(name="*.bias", predicate=one_dimensional): ParamGroupOverride(wd_mult=0.0)}
    settings, vision = stage.optimizer, stage.model.vision
    if vision is None or (settings.vision_model_lr_mult == 1.0 and settings.vision_model_lr_decay_rate == 1.0):
        return overrides
    multiplier = partial(
        tower_lr_multiplier,
        num_layers=vision.num_layers,
        mult=settings.vision_model_lr_mult,
        decay_rate=settings.vision_model_lr_decay_rate,
    )
    names = ["position_embeddings", "class_token", *(f"decoder.layers.{i}." for i in range(vision.num_layers))]
    for factor in sorted({multiplier("vision_model." + name) for name in names}):

        def has_factor(_: torch.nn.Parameter, name: str, factor: float = factor) -> bool:
            return "vision_model." in name and multiplier(name) == factor

        key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"tower_lr_{factor!r}", fn=has_factor))
        overrides[key] = ParamGroupOverride(max_lr=settings.lr * factor, min_lr=settings.min_lr * factor)
    return overrides
