"""The kinds of ranks in a layout: those that differ in what they hold or do."""

from __future__ import annotations

from megatron_vita.config import StageConfig
from megatron_vita.data.loading.loader import RankCoords


def rank_of(stage: StageConfig, world_size: int, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
    """Global rank of coordinates; tensor varies fastest, then context, data, pipeline (parallel/groups.py)."""
    parallel = stage.parallel
    data = parallel.data_parallel_size(world_size)
    return ((pp * data + dp) * parallel.context_parallel_size + cp) * parallel.tensor_model_parallel_size + tp


def kinds(stage: StageConfig, world_size: int) -> list[int]:
    """One rank of every kind: first, middle and last pipeline stage, each with first and last context rank.

    Of the first context rank the first tensor rank, which has the most tiles (`TileRoutes.tiles_of` gives the first
    ranks one more); of the last one the last, which has the fewest.
    """
    parallel = stage.parallel
    stages = parallel.pipeline_model_parallel_size
    last_cp, last_tp = parallel.context_parallel_size - 1, parallel.tensor_model_parallel_size - 1
    found = []
    for pp in sorted({0, stages // 2, stages - 1}):
        found.append(rank_of(stage, world_size, pp=pp))
        if last_cp or last_tp:
            found.append(rank_of(stage, world_size, pp=pp, cp=last_cp, tp=last_tp))
    return found


def coords_of(stage: StageConfig, world_size: int, rank: int) -> RankCoords:
    """Coordinates of a rank, without process groups: the inverse of `rank_of`."""
    parallel = stage.parallel
    dp_size = parallel.data_parallel_size(world_size)
    rest, tp_rank = divmod(rank, parallel.tensor_model_parallel_size)
    rest, cp_rank = divmod(rest, parallel.context_parallel_size)
    pp_rank, dp_rank = divmod(rest, dp_size)
    return RankCoords(
        dp_rank=dp_rank,
        dp_size=dp_size,
        cp_rank=cp_rank,
        cp_size=parallel.context_parallel_size,
        tp_rank=tp_rank,
        tp_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        holds_tower=pp_rank == 0 and stage.model.vision is not None,
    )
