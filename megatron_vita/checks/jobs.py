"""Jobs of the ranks: one compared step of a stage, from a case of the grid or from a user's recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_vita import device
from megatron_vita.checks.options import DTYPES, Case, case_stage, make_stage
from megatron_vita.checks.tiny import IMAGES, shrink_tower, tiny_model
from megatron_vita.config import ParallelConfig, StageConfig
from megatron_vita.config.rotary import RotaryConfig
from megatron_vita.errors import ConfigError

MOST_FORKED = 8
"""Ranks of a recipe's layout that are forked on one machine without a GPU."""
_TORCH = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankJob:
    """One optimizer step to run and compare."""

    name: str
    world_size: int
    stage: StageConfig
    images: str
    """Positions of the tiles, see tiny.IMAGES."""
    dtype: torch.dtype


def case_job(case: Case) -> RankJob:
    """The job of a case of the grid."""
    return RankJob(str(case), case.world_size, case_stage(case), case.images, _TORCH[case.dtype])


def recipe_world(stage: StageConfig) -> int:
    """Ranks to fork for a recipe's layout: two replicas, or one where that would be many.

    Raises:
        ConfigError: too many for one machine.
    """
    size, most = stage.parallel.replica_size, device.num_accelerators() or MOST_FORKED
    if size > most:
        raise ConfigError(
            f"stage {stage.name!r} takes {size} ranks a replica, more than the {most} that can be forked on this "
            "machine. Start this command with torchrun on as many GPUs, or lower a degree."
        )
    return 2 * size if 2 * size <= most else size


def recipe_jobs(stage: StageConfig, world_size: int, dtypes: str | None) -> Iterator[RankJob]:
    """A stage of a user's recipe: its parallel section, frozen parts, micro-batch size and model switches, with widths
    shrunk to what the layout can split. All layers stay where pipeline settings count them; else there are a few.

    Args:
        stage: the merged settings.
        world_size: ranks.
        dtypes: comma-separated; none: float64, and what the stage trains in.

    Raises:
        ConfigError: the layout does not fit the ranks or the model.
    """
    chosen = dtypes.split(",") if dtypes else ["float64", "bf16" if stage.train.bf16 else "float32"]
    if unknown := [one for one in chosen if one not in DTYPES]:
        raise ConfigError(f"--dtype {unknown[0]}: choose of {', '.join(DTYPES)}.")
    parallel, model = stage.parallel, stage.model
    stage.check_layout(parallel.replica_size)  # of the real widths: the small ones are chosen to fit
    data = parallel.data_parallel_size(world_size)
    heads = math.lcm(4, parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    parallel, layers = _shrunk(parallel, model.num_layers)
    tiny = tiny_model(heads=heads, layers=layers, tied=not model.untie_embeddings_and_output_weights)
    tiny = dataclasses.replace(
        tiny,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        **{field.name: getattr(model, field.name) for field in dataclasses.fields(RotaryConfig)},
        projector=dataclasses.replace(tiny.projector, bias=model.projector.bias),
        transformer_impl=model.transformer_impl,
        vision=shrink_tower(model.vision, heads) if model.vision else None,
    )
    rows = max(2, parallel.pipeline_model_parallel_size)
    size = min(2, stage.train.micro_batch_size)
    for dtype in chosen:
        for images in IMAGES if model.vision else ("none",):
            made = make_stage(
                parallel,
                tiny,
                rows * size * data,
                size,
                stage.data.reset_per_document,
                bf16=dtype == "bf16",
                freeze_vision_model=stage.train.freeze_vision_model,
                freeze_vision_projection=stage.train.freeze_vision_projection,
                freeze_language_model=stage.train.freeze_language_model,
            )
            made.check(world_size)
            yield RankJob(f"{stage.name} images={images} dtype={dtype}", world_size, made, images, _TORCH[dtype])


def _shrunk(parallel: ParallelConfig, layers: int) -> tuple[ParallelConfig, int]:
    """Settings and number of layers of a smaller model under the same layout."""
    counting = (
        parallel.pipeline_model_parallel_layout,
        parallel.num_layers_per_virtual_pipeline_stage,
        parallel.decoder_first_pipeline_num_layers,
        parallel.decoder_last_pipeline_num_layers,
    )
    if any(setting is not None for setting in counting):
        return parallel, layers
    stages = parallel.pipeline_model_parallel_size * (parallel.num_virtual_stages_per_pipeline_rank or 1)
    fewer = min(layers, math.lcm(4, stages))
    recomputed = parallel.recompute_num_layers and max(
        size
        for size in range(1, min(parallel.recompute_num_layers, fewer // stages) + 1)
        if fewer // stages % size == 0
    )
    return dataclasses.replace(parallel, recompute_num_layers=recomputed), fewer
