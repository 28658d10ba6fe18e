"""The memory formulas: hand counts of small cases, and what layouts do to them. tests/planning/test_dry_runs.py has the
comparison with dry runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import DataConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.errors import ConfigError
from megatron_vita.planning.decoder_memory import decoder_layer
from megatron_vita.planning.head_memory import head_chunk, head_memory
from megatron_vita.planning.memory import estimate_memory, in_flight, rank_memory
from megatron_vita.planning.rows import Row
from megatron_vita.planning.tape import Tape
from tests.planning.test_planning import LONG_VITA_14B

ROW = Row((32768,), tiles=60, labelled=16384)
TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True}


def stage(train: dict[str, Any] | None = None, **parallel: Any) -> StageConfig:
    return StageConfig(
        model=LONG_VITA_14B,
        data=DataConfig(seq_length=32768),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(bf16=True, **{"global_batch_size": 64, **(train or {})}),
    )


def test_tape() -> None:
    tape = Tape(a=3)
    tape.new(b=4)
    tape.free("a", "never made")
    tape.brief(5)
    assert (tape.now, tape.peak) == (4, 9)
    tape.new(c=1)
    tape.keep({"c"})
    tape.restart()
    assert (tape.now, tape.peak) == (1, 1)
    with pytest.raises(ValueError, match="c lives already"):
        tape.new(c=1)


def test_what_a_layer_keeps_by_hand() -> None:
    """Per token, in numbers of 2 bytes: both norms' inputs and outputs; queries, keys, values and output of attention;
    gate, up and product. In float32: log-sum-exp and both norms' factors."""
    q, kv, ffn, h = 5120, 1024, 13824, 5120
    kept = 2 * (4 * h + 2 * q + 2 * kv + 3 * ffn) + 4 * (40 + 2)
    assert decoder_layer(stage(), ROW, 2).kept == 32768 * kept
    frozen = decoder_layer(stage({"freeze_language_model": True}), ROW, 2).kept
    assert frozen == 32768 * (kept - 2 * (2 * h + ffn))  # a frozen linear layer keeps no input


def test_tensor_and_sequence_parallelism_split_a_layer() -> None:
    split = decoder_layer(stage(**TP8), ROW, 2)
    assert split.kept == decoder_layer(stage(), ROW, 2).kept / 8
    without = decoder_layer(stage(tensor_model_parallel_size=8), ROW, 2)
    assert without.kept > 1.5 * split.kept


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_context_parallelism_splits_what_is_kept(kind: str) -> None:
    one, two = decoder_layer(stage(), ROW, 2), decoder_layer(stage(context_parallel_size=2, cp_comm_type=kind), ROW, 2)
    again = 32768 / 2 * 2 * 5120 * (kind == "a2a")  # the output by heads, and by tokens
    assert two.kept == one.kept / 2 + again
    assert two.backward > two.kept


def test_recomputed_layers_keep_their_input() -> None:
    def total(**settings: Any) -> float:
        return estimate_memory(stage(**TP8, **settings), 64, ROW).total

    def full(method: str, layers: int) -> float:
        return total(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)

    falling = [total(), total(recompute_granularity="selective"), full("block", 24), full("block", 48)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == 4
    assert full("uniform", 1) == pytest.approx(full("block", 48))
    assert full("uniform", 24) > full("uniform", 4)


def test_micro_batches_in_flight_by_hand() -> None:
    """1F1B of 4 ranks: 4, 3, 2, 1. Interleaved with 2 chunks a rank: a warm-up of 2 (3 - rank) + 4, and one more."""
    assert [in_flight(4, 1, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, 2, rank, 16) for rank in range(4)] == [11, 9, 7, 5]
    assert in_flight(4, 1, 0, 2) == 2


def test_the_first_pipeline_ranks_keep_the_most() -> None:
    ranks = [rank_memory(stage(pipeline_model_parallel_size=4, **TP8), 64, rank, ROW) for rank in range(4)]
    kept = [one.activations for one in ranks]
    assert kept == sorted(kept, reverse=True)
    assert estimate_memory(stage(pipeline_model_parallel_size=4, **TP8), 64, ROW) == max(
        ranks, key=lambda one: one.total
    )
    interleaved = stage(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=2, **TP8)
    assert rank_memory(interleaved, 64, 0, ROW).activations > kept[0]


def test_the_head_is_on_the_last_rank() -> None:
    pipeline = stage(pipeline_model_parallel_size=4, **TP8)
    many, few = (dataclasses.replace(ROW, labelled=labelled) for labelled in (32768, 8))
    assert rank_memory(pipeline, 64, 3, many).total > rank_memory(pipeline, 64, 3, few).total
    assert rank_memory(pipeline, 64, 1, many) == rank_memory(pipeline, 64, 1, few)


def test_the_heads_chunk_by_hand() -> None:
    assert head_chunk(16384, 5120, 152064 / 8) == 512  # 1/32 of the labelled tokens
    assert head_chunk(1000, 5120, 152064) == 256
    assert head_chunk(8, 5120, 152064) == 8
    trained, frozen = (head_memory(stage({"freeze_language_model": one}), 1000, 32768, 2) for one in (False, True))
    assert trained.kept > frozen.kept


def test_weights_gradients_and_optimizer() -> None:
    plain, more = (estimate_memory(stage(**TP8), gpus, ROW) for gpus in (8, 64))
    norms = 97 * 5120 * 7 / 8  # replicated
    parameters = 14_770_033_664 / 8 + norms + 304_012_288 + 9_445_376
    assert plain.weights == pytest.approx(2 * parameters, rel=1e-9)
    assert plain.gradients == 2 * plain.weights
    assert plain.optimizer == 6 * plain.weights == more.optimizer * 8
    frozen = estimate_memory(stage({"freeze_language_model": True, "freeze_vision_model": True}, **TP8), 8, ROW)
    assert frozen.gradients == 4 * 9_445_376
    with pytest.raises(ConfigError, match="Launch a multiple of 8"):
        estimate_memory(stage(**TP8), 12)


def test_layers_of_an_uneven_pipeline() -> None:
    even, uneven = (
        rank_memory(stage(pipeline_model_parallel_size=4, **more), 64, 1, ROW)
        for more in ({}, {"pipeline_model_parallel_layout": "Et*9|t*15|t*15|t*9L"})
    )
    assert uneven.weights == pytest.approx(even.weights * 15 / 12)
    assert uneven.activations == pytest.approx(even.activations * 15 / 12, rel=0.01)


def test_a_frozen_tower_keeps_less() -> None:
    trained, frozen = (
        rank_memory(stage({"freeze_vision_model": one}, pipeline_model_parallel_size=4), 64, 0, ROW)
        for one in (False, True)
    )
    assert frozen.gradients < trained.gradients
    assert frozen.total < trained.total


def test_a_tied_weights_gradient_waits_for_the_embedding() -> None:
    tied = dataclasses.replace(LONG_VITA_14B, untie_embeddings_and_output_weights=False)
    for pp, waits in ((1, True), (2, False)):
        layout = dataclasses.replace(stage(pipeline_model_parallel_size=pp), model=tied)
        found = head_memory(layout, 1000, 32768, 2)
        assert found.lasting == 4 * 152064 * 5120 * waits
    assert head_memory(stage(), 1000, 32768, 2).lasting == 0
