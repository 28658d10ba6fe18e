"""One step of the distributed optimizer: gradient norm and new weights as in one process, in every layout (float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita.models.build import local_shard
from megatron_vita.parallel.groups import destroy_groups
from tests.models.parity import make_packed, named, one_step, stage_of
from tests.models.test_vita_parallel import CP2, PP2, SP2, TP2
from tests.models.test_vita_pipeline import SIX_LAYERS, VPP2
from tests.ranks import run_ranks


def _updated(parallel: dict[str, Any]) -> Any:
    """Chunks, groups and gradient norm after one clipped AdamW step; a large epsilon keeps the update smooth in g."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    def update(wrapped: list[Any]) -> float:
        settings = OptimizerConfig(
            optimizer="adam", lr=0.5, adam_eps=1.0, weight_decay=0.1, clip_grad=0.7, use_distributed_optimizer=True
        )
        optimizer = get_megatron_optimizer(settings, wrapped)
        _, norm, _ = optimizer.step()
        return float(norm)

    return one_step(
        stage_of(parallel, model=SIX_LAYERS),
        make_packed(),
        dtype=torch.float32,
        after=update,
        distributed_optimizer=True,
    )


def _write(path: str) -> None:
    models, _, norm = _updated({})
    torch.save({"norm": norm, "weights": {name: one.detach() for name, one in named(*models)}}, path)


def _compare(path: str, layouts: list[dict[str, Any]]) -> None:
    want = torch.load(path, weights_only=True)
    for parallel in layouts:
        models, groups, norm = _updated(parallel)
        assert abs(norm / want["norm"] - 1) < 1e-4, (parallel, norm, want["norm"])
        for name, parameter in named(*models):
            mine = local_shard(want["weights"][name], parameter, name, models[0].model, groups)
            torch.testing.assert_close(
                parameter, mine, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
        destroy_groups()


@pytest.mark.slow
def test_two_ranks_step_like_one_process(tmp_path: Path) -> None:
    run_ranks(1, _write, str(tmp_path / "reference"))
    run_ranks(2, _compare, str(tmp_path / "reference"), [{}, TP2, SP2, PP2, VPP2, CP2])


@pytest.mark.slow
def test_four_ranks_step_like_one_process(tmp_path: Path) -> None:
    run_ranks(1, _write, str(tmp_path / "reference"))
    run_ranks(4, _compare, str(tmp_path / "reference"), [TP2, SP2, {**SP2, **CP2}, {**TP2, **VPP2}])
