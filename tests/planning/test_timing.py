"""The time model: hand counts, and what must hold whatever the figures are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import DataConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.errors import ConfigError
from megatron_vita.planning.flops import attention_flops, model_flops, rank_flops
from megatron_vita.planning.hardware import HARDWARE, Efficiency, hardware_of
from megatron_vita.planning.rows import Row
from megatron_vita.planning.timing import StepTime, step_time
from tests.planning.test_planning import LONG_VITA_14B

ROW = Row((32768,), tiles=0, labelled=16384)
ALL = Efficiency(matrices=1, attention=1, memory=1, links=1)


def stage(**parallel: Any) -> StageConfig:
    return StageConfig(
        model=LONG_VITA_14B,
        data=DataConfig(seq_length=32768),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(bf16=True, global_batch_size=64),
    )


def time(gpus: int = 64, hardware: str = "H100", efficiency: Efficiency = ALL, **parallel: Any) -> StepTime:
    return step_time(stage(**parallel), gpus, HARDWARE[hardware], ROW, efficiency)


def test_one_gpu_computes_only() -> None:
    one = time(gpus=1)
    executed, attention, peak = rank_flops(stage(), 0, ROW), attention_flops(stage(), 0, ROW), HARDWARE["H100"].bf16
    assert one.attention == pytest.approx(64 * attention / peak)
    assert one.matrices + one.attention == pytest.approx(64 * executed / peak)
    assert (one.tensor, one.context, one.pipeline, one.bubble, one.data) == (0, 0, 0, 0, 0)
    assert one.seconds == pytest.approx(sum(one.parts.values()))
    assert one.tokens == 64 * 32768
    assert one.mfu == pytest.approx(64 * model_flops(stage(), ROW) / one.seconds / peak)
    assert one.mfu < 1
    half = dataclasses.replace(ALL, matrices=0.5)
    assert time(gpus=1, efficiency=half).matrices == pytest.approx(2 * one.matrices)


def test_tensor_collectives_by_hand() -> None:
    """Of 8 ranks: 4 gathers or scatters in a layer's forward and 2 in its backward are exposed, over NVLink."""
    found = time(tensor_model_parallel_size=8, sequence_parallel=True)
    once = 32768 * 5120 * 2 * 7 / 8 / HARDWARE["H100"].nvlink
    assert found.tensor == pytest.approx(8 * 48 * 6 * once)
    recomputing = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    again = time(tensor_model_parallel_size=8, sequence_parallel=True, **recomputing)
    assert again.tensor == pytest.approx(found.tensor * 10 / 6)


def test_a_group_within_a_node_is_faster() -> None:
    within, across = (time(context_parallel_size=size, cp_comm_type="a2a").context for size in (8, 16))
    assert across > 2 * within


def test_the_ring_hides_behind_attention() -> None:
    ring, gathered = (time(context_parallel_size=8, cp_comm_type=kind).context for kind in ("p2p", "all_gather"))
    assert ring < gathered


def test_the_bubble_by_hand() -> None:
    """(ranks - 1) micro-batches of a rank without virtual stages, half of them with two."""
    plain, virtual = (
        time(gpus=4, pipeline_model_parallel_size=4, **more)
        for more in ({}, {"num_virtual_stages_per_pipeline_rank": 2})
    )
    work = plain.matrices + plain.attention + plain.memory + plain.pipeline
    assert plain.bubble == pytest.approx(work / 64 * 3)
    assert virtual.bubble == pytest.approx(plain.bubble / 2, rel=0.02)
    assert virtual.pipeline == pytest.approx(2 * plain.pipeline)


def test_overlap_hides_the_gradients_reduction() -> None:
    layout = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    assert time(overlap_grad_reduce=True, **layout).data < time(**layout).data


@pytest.mark.parametrize("name", HARDWARE)
def test_a_faster_gpu_is_faster(name: str) -> None:
    hardware = HARDWARE[name]
    assert hardware.name == name
    assert hardware.network < hardware.nvlink < hardware.memory_bandwidth
    faster = dataclasses.replace(hardware, bf16=2 * hardware.bf16)
    slow, fast = (step_time(stage(), 1, one, ROW) for one in (hardware, faster))
    assert slow.seconds > fast.seconds > slow.seconds / 2


def test_hardware_by_name() -> None:
    assert hardware_of("a100").name == "A100-80"
    with pytest.raises(ConfigError, match=r"'V100'\. Choose one of A100-40, A100-80, H100, H200, H20"):
        hardware_of("V100")
