"""Parameter counts against published models, FLOPs against hand-computed ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vita.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ProjectorConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_vita.planning.flops import decoder_forward, model_flops, rank_flops, step_flops, tower_forward
from megatron_vita.planning.parameters import count_parameters, rank_parameters
from megatron_vita.planning.rows import Row, assumed_row

LONG_VITA_14B = ModelConfig(
    num_layers=48,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=8,
    vocab_size=152064,
    max_position_embeddings=1310720,
    vision=VisionConfig(),
    projector=ProjectorConfig(ffn_hidden_size=1024, bias=False),
)


def stage(**changes: object) -> StageConfig:
    base = StageConfig(
        model=LONG_VITA_14B,
        data=DataConfig(seq_length=32768),
        parallel=ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True),
        train=TrainConfig(bf16=True, global_batch_size=8),
    )
    return dataclasses.replace(base, **changes)


def test_long_vita_14b_has_its_published_size() -> None:
    counted = count_parameters(LONG_VITA_14B)
    assert counted.decoder == 14_770_033_664
    assert counted.tower == 304_012_288
    assert counted.projector == 9_445_376


INTERN_VIT_6B = VisionConfig(
    num_layers=45,
    hidden_size=3200,
    ffn_hidden_size=12800,
    num_attention_heads=25,
    normalization="RMSNorm",
    add_qkv_bias=False,
    qk_layernorm=True,
)
SIGLIP_400M = VisionConfig(
    model_type="siglip",
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    image_size=224,
    image_norm="siglip",
)
CLIP_L = VisionConfig(model_type="clip", image_size=336, norm_epsilon=1e-5, image_norm="clip")


def _published(vision: VisionConfig) -> int:
    """Parameters of the transformers module of that shape, on the meta device."""
    transformers = pytest.importorskip("transformers")
    names = {"hidden_size": vision.hidden_size, "intermediate_size": vision.ffn_hidden_size}
    names |= {"num_hidden_layers": vision.built_layers, "num_attention_heads": vision.num_attention_heads}
    names |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    with torch.device("meta"):
        if vision.model_type == "siglip":
            config = transformers.SiglipVisionConfig(**names, vision_use_head=False)
            return transformers.SiglipVisionModel(config).num_parameters()
        if vision.model_type == "clip":
            # CLIP's post_layernorm applies to the class token only and is not built
            return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**names)).num_parameters() - 2048
        config = transformers.InternVLVisionConfig(
            **names, norm_type="rms_norm", attention_bias=False, use_qk_norm=True, use_mean_pooling=True
        )
        return transformers.InternVLVisionModel(config).num_parameters()


@pytest.mark.parametrize("vision", [INTERN_VIT_6B, SIGLIP_400M, CLIP_L], ids=["InternViT-6B", "SigLIP", "CLIP-L"])
def test_towers_have_their_published_sizes(vision: VisionConfig) -> None:
    assert count_parameters(dataclasses.replace(LONG_VITA_14B, vision=vision)).tower == _published(vision)


def test_a_tied_head_counts_once() -> None:
    tied = dataclasses.replace(LONG_VITA_14B, untie_embeddings_and_output_weights=False)
    assert count_parameters(LONG_VITA_14B).total - count_parameters(tied).total == 152064 * 5120


def test_decoder_operations_by_hand() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=10
    )
    layer = (4 + 4) * 4 + 4 * 4 + 3 * 8 * 4  # matrices: norms and biases are no products
    pairs = 3 * 4 / 2 + 2 * 3 / 2
    assert decoder_forward(model, [3, 2], labelled=2) == 2 * layer * 5 + 4 * pairs * 4 + 2 * 2 * 10 * 4


def test_documents_cost_less_attention_than_one_sequence() -> None:
    assert decoder_forward(LONG_VITA_14B, [512] * 4, 0) < decoder_forward(LONG_VITA_14B, [2048], 0)


ROW = Row((32768,), tiles=60, labelled=16384)


def frozen(**parts: bool) -> StageConfig:
    return stage(train=TrainConfig(bf16=True, global_batch_size=8, **parts))


def test_frozen_parts_cost_less() -> None:
    aligned = step_flops(frozen(freeze_language_model=True, freeze_vision_model=True), ROW)
    assert 0.55 < aligned / step_flops(stage(), ROW) < 0.85
    assert tower_forward(LONG_VITA_14B, 2) == 2 * tower_forward(LONG_VITA_14B, 1) > 0


def test_a_part_that_trains_costs_two_more_forwards() -> None:
    """The model's FLOPs, by part; recomputation and flash attention's fifth product are not the model's."""
    decoder, tower = decoder_forward(LONG_VITA_14B, ROW.documents, ROW.labelled), tower_forward(LONG_VITA_14B, 60)
    assert model_flops(stage(), ROW) == pytest.approx(3 * decoder + 3 * tower)
    text_only = dataclasses.replace(LONG_VITA_14B, vision=None)
    assert model_flops(stage(model=text_only), ROW) == pytest.approx(3 * decoder)
    one = frozen(freeze_vision_model=True, freeze_vision_projection=True)
    assert model_flops(one, ROW) == pytest.approx(3 * decoder + tower)


def test_the_ranks_of_a_replica_share_the_work() -> None:
    """Every split of a replica executes the same FLOPs, but for the tiles that an encoder micro-batch repeats."""
    layouts = [
        {"tensor_model_parallel_size": 8, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "context_parallel_size": 4},
        {"pipeline_model_parallel_size": 4, "num_virtual_stages_per_pipeline_rank": 2},
        {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 9},
    ]
    train = TrainConfig(bf16=True, global_batch_size=8, freeze_vision_model=True)
    found = {step_flops(stage(parallel=ParallelConfig(**layout), train=train), ROW) for layout in layouts}
    assert max(found) == pytest.approx(min(found), rel=1e-3)


def test_recomputation_is_executed_but_not_the_models() -> None:
    def recomputing(**settings: object) -> StageConfig:
        return stage(parallel=ParallelConfig(recompute_granularity="full", **settings))  # type: ignore[arg-type]

    plain = stage(parallel=ParallelConfig())
    every = recomputing(recompute_method="uniform", recompute_num_layers=1)
    half = recomputing(recompute_method="block", recompute_num_layers=24)
    assert model_flops(every, ROW) == model_flops(plain, ROW)
    layers = decoder_forward(LONG_VITA_14B, ROW.documents, 0)
    assert rank_flops(every, 0, ROW) - rank_flops(plain, 0, ROW) == pytest.approx(layers)
    assert rank_flops(half, 0, ROW) - rank_flops(plain, 0, ROW) == pytest.approx(layers / 2)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_ranks_hold_all_parameters(tp: int, tied: bool) -> None:
    model = dataclasses.replace(LONG_VITA_14B, untie_embeddings_and_output_weights=not tied)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=3)
    counted, ranks = count_parameters(model), [rank_parameters(model, parallel, rank) for rank in range(3)]
    table = model.vocab_size * model.hidden_size
    copies = table if tied else 0  # the last stage has the embedding too
    norms = (2 * model.num_layers + 1) * model.hidden_size  # on every tensor rank
    split = counted.decoder + copies - norms
    assert sum(one.decoder for one in ranks) == split // tp + norms
    assert sum(one.tower + one.projector for one in ranks) == counted.tower + counted.projector


def test_a_row_is_full() -> None:
    for reset, documents in ((True, 16), (False, 1)):
        row = assumed_row(stage(data=DataConfig(seq_length=32768, reset_per_document=reset)))
        assert (row.tokens, len(row.documents)) == (32768, documents)
        assert row.labelled + row.tiles * 256 <= row.tokens
    assert assumed_row(stage(), picture_fraction=0.9).tiles > row.tiles
