"""Groups of several layouts, one after the other in the same processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.checkpoint.agree import on_rank_zero
from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError
from megatron_vita.parallel.groups import build_groups, destroy_groups, init_distributed
from tests.ranks import run_ranks

STAGES: list[dict[str, Any]] = [
    {},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
]


def _check_rebuild() -> None:
    rank = dist.get_rank()
    for stage in STAGES * 2:
        parallel = ParallelConfig(**stage)
        groups = build_groups(parallel)
        sizes = (groups.dp_size, groups.tp_size, groups.pp_size, groups.cp_size)
        assert sorted(sizes) == [1, 1, 1, 2]
        assert groups.tp_rank + groups.pp_rank + groups.cp_rank + groups.dp_rank == rank
        assert groups.first_stage == (groups.pp_rank == 0)
        assert groups.last_stage == (groups.pp_rank == groups.pp_size - 1)
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total, group=groups.collection.tp_cp)
        assert float(total) == (3.0 if groups.tp_size * groups.cp_size == 2 else rank + 1.0)
        assert groups.tower_collection.tp.size() == 1
        assert groups.tower_collection.tp.rank() == 0
        destroy_groups()
        assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD], "groups of the old layout still live"
    assert on_rank_zero(lambda: {"from": rank}) == {"from": 0}


@pytest.mark.slow
def test_layouts_follow_one_another() -> None:
    run_ranks(2, _check_rebuild)


def _check_order() -> None:
    groups = build_groups(ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2))
    assert groups.group_rank == groups.collection.tp_cp.rank() == dist.get_rank()
    destroy_groups()


def test_group_rank_is_the_order_of_the_routes() -> None:
    run_ranks(4, _check_order)


def _check_too_few() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        build_groups(ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2))
    init_distributed()  # a second call changes nothing
    assert dist.get_world_size() == 2


def test_a_world_that_does_not_divide_is_refused_before_any_group() -> None:
    run_ranks(2, _check_too_few)


def _check_alone() -> None:
    import os

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name)
    init_distributed()
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    groups = build_groups(ParallelConfig())
    assert groups.first_stage
    assert groups.last_stage
    destroy_groups()


def test_one_process_needs_no_launcher_and_no_port() -> None:
    run_ranks(1, _check_alone)
