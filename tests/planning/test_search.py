"""The search: the config accepts every layout, those that fit come ranked, and the others say what would help."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import DataConfig, ModelConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.planning.hardware import HARDWARE, USABLE
from megatron_vita.planning.memory import estimate_memory
from megatron_vita.planning.search import (
    Request,
    describe,
    layouts,
    least_recomputation,
    recomputing,
    search,
)
from megatron_vita.planning.text import suggestions

MODEL = ModelConfig(
    num_layers=6, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16, num_query_groups=4, vocab_size=32000
)
GIB = 1024**3


def stage(**train: Any) -> StageConfig:
    return StageConfig(
        model=MODEL,
        data=DataConfig(seq_length=16384),
        train=TrainConfig(bf16=True, **{"global_batch_size": 32, **train}),
    )


def request(memory: float, gpus: int = 8) -> Request:
    return Request(gpus, memory * GIB, HARDWARE["H100"])


def test_layouts_are_accepted_and_complete() -> None:
    found = list(layouts(stage(), 8))
    for one in found:
        one.check_layout(8)
        assert one.parallel.recompute_granularity is None
    assert len({(one.parallel, one.train) for one in found}) == len(found)
    sizes = {
        (one.parallel.tensor_model_parallel_size, one.parallel.pipeline_model_parallel_size,
         one.parallel.context_parallel_size, one.parallel.cp_comm_type)
        for one in found
    }  # fmt: skip
    assert {(1, 1, 1, "p2p"), (4, 2, 1, "p2p"), (1, 1, 8, "all_gather"), (1, 1, 4, "a2a"), (2, 2, 2, "p2p")} <= sizes
    assert (1, 1, 8, "a2a") not in sizes, "4 key/value heads do not split over 8 ranks"
    uneven = [one for one in found if one.parallel.pipeline_model_parallel_layout]
    assert uneven, "6 layers over 4 ranks"


def test_fitting_layouts_come_fastest_first() -> None:
    found = search(stage(), request(80), most=5)
    assert len(found.fitting) == 5
    seconds = [one.time.seconds for one in found.fitting]
    assert seconds == sorted(seconds)
    for one in found.fitting:
        assert one.fits
        assert one.memory == estimate_memory(one.stage, 8)
        assert one.memory.total <= USABLE * 80 * GIB
    for one in found.nearest:
        assert not one.fits
        assert one.time.seconds < seconds[0]
        assert one.remedy


def test_less_memory_takes_more_recomputation() -> None:
    layout = next(layouts(stage(), 8))
    plain = request(80).judge(layout).memory.total / GIB
    found = [
        least_recomputation(layout, request(memory / USABLE)) for memory in (plain + 0.1, plain - 0.1, plain * 0.6)
    ]
    assert found[0].stage.parallel.recompute_granularity is None
    assert found[1].stage.parallel.recompute_num_layers == 1
    few = found[2].stage.parallel.recompute_num_layers
    assert found[2].fits
    assert few > 1
    fewer = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": few - 1}
    assert not request(plain * 0.6 / USABLE).judge(recomputing(layout, **fewer)).fits
    seconds = [one.time.seconds for one in found]
    assert seconds == sorted(seconds)


def test_nothing_fits() -> None:
    found = search(stage(), request(1))
    assert not found.fitting
    over = [one.over for one in found.nearest]
    assert over == sorted(over)
    assert "leaves it" in found.nearest[0].remedy
    lines = suggestions(found, 8, request(1).judge(stage()))
    assert lines[0] == "  no layout fits"
    assert "too many" in lines[1]


def test_a_layout_in_a_line() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=3, context_parallel_size=2, cp_comm_type="a2a",
        recompute_granularity="selective",
    )  # fmt: skip
    layout = dataclasses.replace(stage(micro_batch_size=2), parallel=parallel)
    assert describe(layout, 16) == "tp2 pp2x3 cp2 a2a dp2 micro-batch 2 recompute selective"


def test_memory_of_the_request_counts() -> None:
    small, large = (search(stage(), request(memory), most=1).fitting[0] for memory in (16, 140))
    assert small.time.seconds >= large.time.seconds
    assert small.memory.total <= USABLE * 16 * GIB


@pytest.mark.parametrize("packs", [1, 2])
def test_micro_batches_grow_the_row(packs: int) -> None:
    row = request(80).row_of(stage(micro_batch_size=packs))
    assert row.tokens == packs * 16384
