"""parallel.cp_comm_type: settings that are rejected before any process group is created."""

from __future__ import annotations

import pytest

from megatron_vita.config import CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.errors import ConfigError


def _stage(heads: int, groups: int, tp: int, cp: int, kind: str) -> StageConfig:
    return StageConfig(
        model=ModelConfig(
            hidden_size=8 * heads, ffn_hidden_size=64, num_attention_heads=heads, num_query_groups=groups, vocab_size=32
        ),
        data=DataConfig(data_path="shards", seq_length=4096),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, cp_comm_type=kind),
        train=TrainConfig(global_batch_size=8),
        checkpoint=CheckpointConfig(save="save"),
    )


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_p2p_and_all_gather_work_on_any_number_of_ranks(kind: str, cp: int) -> None:
    stage = _stage(8, 1, 1, cp, kind)
    if 4096 % cp == 0:
        stage.check(cp)


@pytest.mark.parametrize(("groups", "tp", "cp"), [(8, 1, 8), (8, 2, 4), (8, 4, 2), (8, 8, 1), (4, 1, 2)])
def test_a2a_works_where_heads_divide(groups: int, tp: int, cp: int) -> None:
    _stage(8, groups, tp, cp, "a2a").check(tp * cp)


@pytest.mark.parametrize(
    ("groups", "tp", "cp", "nearest"), [(8, 4, 4, 2), (2, 1, 4, 2), (1, 1, 2, 1), (8, 2, 8, 4), (8, 8, 2, 1)]
)
def test_too_few_heads_are_rejected_with_the_nearest_choice(groups: int, tp: int, cp: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=rf"not a multiple of .*Use context_parallel_size={nearest}, .*p2p") as error:
        _stage(8, groups, tp, cp, "a2a").check(tp * cp)
    assert f"num_query_groups={groups} / tensor_model_parallel_size={tp}" in str(error.value)


@pytest.mark.parametrize("kind", ["a2a+p2p", "ring", ""])
def test_unknown_types_are_rejected(kind: str) -> None:
    with pytest.raises(ConfigError, match="choose one of p2p, all_gather, a2a"):
        ParallelConfig(cp_comm_type=kind)


def test_the_default_is_p2p() -> None:
    assert ParallelConfig().cp_comm_type == "p2p", "Megatron's own default, too"
