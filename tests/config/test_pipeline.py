"""Layers assigned to pipeline stages: every flag, megatron-core's own reading of the notation, what is rejected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.config import CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, StageConfig, TrainConfig
from megatron_vita.config.pipeline import nearly_even, pipeline_split
from megatron_vita.errors import ConfigError


def _split(num_layers: int, ranks: int, **flags: Any) -> tuple[int, ...]:
    return pipeline_split(ParallelConfig(pipeline_model_parallel_size=ranks, **flags), num_layers).layers


@pytest.mark.parametrize(
    ("layers", "ranks", "flags", "want"),
    [
        (6, 1, {}, (6,)),
        (6, 2, {}, (3, 3)),
        (8, 2, {"num_layers_per_virtual_pipeline_stage": 2}, (2, 2, 2, 2)),
        (8, 2, {"num_virtual_stages_per_pipeline_rank": 4}, (1,) * 8),
        (7, 3, {"decoder_first_pipeline_num_layers": 1}, (1, 3, 3)),
        (7, 3, {"decoder_last_pipeline_num_layers": 1}, (3, 3, 1)),
        (9, 4, {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 1}, (2, 3, 3, 1)),
        (3, 2, {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}, (1, 2)),
        (
            10,
            3,
            {"decoder_first_pipeline_num_layers": 2, "num_virtual_stages_per_pipeline_rank": 2},
            (1, 2, 2, 1, 2, 2),
        ),
        (9, 2, {"pipeline_model_parallel_layout": "Et*3|(tt|)*2,ttL"}, (3, 2, 2, 2)),
        (3, 2, {"pipeline_model_parallel_layout": "E|t, t|t|L"}, (0, 2, 1, 0)),
    ],
)
def test_layers_are_assigned(layers: int, ranks: int, flags: dict[str, Any], want: tuple[int, ...]) -> None:
    assert _split(layers, ranks, **flags) == want


@settings(deadline=None)  # the first example imports megatron-core
@given(st.lists(st.integers(1, 3), min_size=2, max_size=8), st.sampled_from(["{}", "({}|)*1"]), st.data())
def test_the_notation_means_what_megatron_core_reads(layers: list[int], form: str, data: st.DataObject) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    ranks = data.draw(st.sampled_from([size for size in range(2, len(layers) + 1) if len(layers) % size == 0]))
    written = [f"t*{count}" if data.draw(st.booleans()) else "t" * count for count in layers]
    middle = ["(" + one + "|)*1" if form != "{}" else one + "|" for one in written[1:-1]]
    text = f"E,{written[0]}|" + ",".join(middle) + written[-1] + "L"
    split = pipeline_split(
        ParallelConfig(pipeline_model_parallel_size=ranks, pipeline_model_parallel_layout=text), sum(layers)
    )
    mcore = PipelineParallelLayerLayout(text, ranks)
    assert list(split.layers) == layers
    assert PipelineParallelLayerLayout(split.stages(), ranks).layout == mcore.layout
    assert split.virtual == mcore.virtual_pipeline_model_parallel_size
    assert [split.on_rank(rank) for rank in range(ranks)] == [
        sum(stage.count(LayerType.decoder) for stage in mcore.layout[rank]) for rank in range(ranks)
    ]


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 4))
def test_nearly_even_is_even_and_reads_back(layers: int, ranks: int, virtual: int) -> None:
    split = nearly_even(layers, ranks, virtual)
    assert sum(split.layers) == layers
    assert max(split.layers) - min(split.layers) <= 1
    assert split.virtual == virtual
    if ranks > 1 and all(split.layers[1:-1]):
        assert _split(layers, ranks, pipeline_model_parallel_layout=str(split)) == split.layers


PP2 = {"pipeline_model_parallel_size": 2}
REJECTED: list[tuple[dict[str, Any], int, str]] = [
    (PP2, 7, "not a multiple of parallel.pipeline_model_parallel_size=2.*layout='Ettt.ttttL'"),
    ({"pipeline_model_parallel_size": 4}, 6, "pipeline_model_parallel_size 2 or 3 divides"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 2}, 6, "stage=2 does not divide the 3 layers"),
    ({**PP2, "num_virtual_stages_per_pipeline_rank": 2}, 6, "rank=2 does not divide the 3 layers"),
    ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 1}, 6, "5 layers are left for 2 ranks"),
    ({**PP2, "decoder_first_pipeline_num_layers": 9}, 6, "left for 1 ranks"),
    ({**PP2, "pipeline_model_parallel_layout": "Ettt|ttL"}, 6, "has 5 layers, but model.num_layers=6.*For example"),
    ({**PP2, "pipeline_model_parallel_layout": "Ettt|mttL"}, 6, r"\['m'\] is not known"),
    ({**PP2, "pipeline_model_parallel_layout": "Ett|tt|ttL"}, 6, "3 stages, which is no multiple"),
    ({**PP2, "pipeline_model_parallel_layout": "tEtt|tttL"}, 6, "the only E"),
    ({**PP2, "pipeline_model_parallel_layout": "Ettt||ttt|L"}, 6, "stage 1 is empty"),
    ({**PP2, "pipeline_model_parallel_layout": "Et*999999999|L"}, 6, "too many"),
]


@pytest.mark.parametrize(("flags", "layers", "message"), REJECTED)
def test_what_does_not_divide_is_rejected(flags: dict[str, Any], layers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_split(ParallelConfig(**flags), layers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_virtual_stages_per_pipeline_rank": 2}, "does nothing at pipeline_model_parallel_size 1"),
        ({"pipeline_model_parallel_layout": "EttL"}, "does nothing at pipeline_model_parallel_size 1"),
        (
            {**PP2, "num_virtual_stages_per_pipeline_rank": 2, "num_layers_per_virtual_pipeline_stage": 1},
            "say the same",
        ),
        ({**PP2, "pipeline_model_parallel_layout": "Et|tL", "decoder_first_pipeline_num_layers": 1}, "already says"),
        ({**PP2, "num_virtual_stages_per_pipeline_rank": 0}, "at least 1"),
    ],
)
def test_flags_that_contradict_are_rejected(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**flags)


def test_an_interleaved_pipeline_needs_micro_batches_in_groups() -> None:
    def stage(batch: int) -> StageConfig:
        return StageConfig(
            model=ModelConfig(vocab_size=5),
            parallel=ParallelConfig(**PP2, num_virtual_stages_per_pipeline_rank=2),
            train=TrainConfig(global_batch_size=batch),
            data=DataConfig(data_path="shards"),
            checkpoint=CheckpointConfig(save="run"),
        )

    stage(4).check(2)
    stage(4).check(4)
    with pytest.raises(ConfigError, match=r"micro-batches of a data rank.*=3 is not a multiple.*Use 2 or 4"):
        stage(3).check(2)
    with pytest.raises(ConfigError, match="=1 is not a multiple"):
        stage(2).check(4)


@pytest.mark.parametrize(
    ("flags", "unit", "message"),
    [
        ({}, 4, "4 layers at a time, but a pipeline stage has 6. Use recompute_num_layers 3 or 6, or .* block"),
        (PP2, 2, "2 layers at a time, but a pipeline stage has 3. Use recompute_num_layers 1 or 3"),
        ({**PP2, "pipeline_model_parallel_layout": "Ett|ttttL"}, 4, "a pipeline stage has 2. Use .* 2, or"),
        ({}, 7, "a pipeline stage has 6. Use recompute_num_layers 6, or"),
    ],
)
def test_uniform_recomputation_needs_whole_units(flags: dict[str, Any], unit: int, message: str) -> None:
    """megatron-core would run past a stage's last layer, in the first step."""

    def stage(method: str) -> StageConfig:
        how = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": unit}
        return StageConfig(
            model=ModelConfig(vocab_size=5, num_layers=6),
            parallel=ParallelConfig(**flags, **how),
            train=TrainConfig(global_batch_size=2),
            data=DataConfig(data_path="shards"),
            checkpoint=CheckpointConfig(save="run"),
        )

    stage("block").check(2)
    with pytest.raises(ConfigError, match=message):
        stage("uniform").check(2)
