"""Every visual token reaches the owner of its placeholder once; its gradient comes back once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vita.config import ParallelConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.tiles import build_exchange, exchange_features
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
TILES = {"many": (0, 5, 9, 14, 22, 27, 33, 40, 44), "fewer than ranks": (21,), "none": ()}


def _check(layouts: list[dict[str, Any]]) -> None:
    for parallel in layouts:
        groups = build_groups(ParallelConfig(**parallel))
        for first in TILES.values():
            _check_one(groups, np.array(first, dtype=np.int64))
        destroy_groups()


def _check_one(groups: Any, first: Any) -> None:
    layout = SequenceLayout((13, 9, 20, 5, 1), cp=groups.cp_size, sp=groups.sequence_shards)
    routes = TileRoutes(layout, first, 4, tp=groups.tp_size)
    visual_tokens = len(first) * 4
    features = torch.arange(visual_tokens * 3, dtype=torch.float64).view(visual_tokens, 3) + 1
    mine = routes.tiles_of(groups.group_rank)
    local = features[mine.start * 4 : mine.stop * 4].clone().requires_grad_()
    exchange = build_exchange(routes, groups.group_rank, torch.device("cpu"))
    got, index = exchange_features(local, exchange, groups), exchange.index

    positions = layout.local_positions(groups.cp_rank)
    if groups.sequence_parallel:
        positions = np.split(positions, groups.tp_size)[groups.tp_rank]
    expected = torch.zeros(layout.length, 3, dtype=torch.float64)
    places = (first[:, None] + np.arange(4)).reshape(-1)
    expected[torch.from_numpy(places)] = features
    filled = torch.zeros(len(positions), 3, dtype=torch.float64).index_copy(0, index, got)
    torch.testing.assert_close(filled, expected[torch.from_numpy(positions)])

    # The gradient of a visual token is its global index, the same on all copies; it must come back unmultiplied.
    got.backward(torch.from_numpy(positions)[index].double()[:, None].expand(-1, 3))
    want = torch.from_numpy(places[mine.start * 4 : mine.stop * 4]).double()[:, None].expand(-1, 3)
    torch.testing.assert_close(local.grad, want)
    counts = torch.tensor(len(mine))
    dist.all_reduce(counts, group=groups.collection.tp_cp)
    assert int(counts) == len(first)


def test_two_ranks() -> None:
    run_ranks(2, _check, [TP2, {**TP2, **SP}, CP2, {}])


@pytest.mark.slow
def test_four_ranks() -> None:
    run_ranks(4, _check, [{**TP2, **CP2}, {**TP2, **SP, **CP2}, {"context_parallel_size": 4}])
