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
from megatron_vita.errors import ConfigError
from megatron_vita.planning.flops import decoder_forward, step_flops, tower_forward
from megatron_vita.planning.memory import estimate_memory
from megatron_vita.planning.parameters import count_parameters

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


def test_memory_follows_the_pipeline_layout() -> None:
    layout = "Et*9|t*15|t*15|t*9L"
    even, uneven = (
        estimate_memory(stage(parallel=ParallelConfig(pipeline_model_parallel_size=4, **more)), 4)
        for more in ({}, {"pipeline_model_parallel_layout": layout})
    )
    assert uneven.weights > even.weights


def test_a_tied_head_counts_once() -> None:
    tied = dataclasses.replace(LONG_VITA_14B, untie_embeddings_and_output_weights=False)
    assert count_parameters(LONG_VITA_14B).total - count_parameters(tied).total == 152064 * 5120


def test_decoder_operations_by_hand() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=10
    )
    layer = (4 + 4) * 5 + 4 * 4 + 3 * 8 * 4 + 8
    pairs = 3 * 4 / 2 + 2 * 3 / 2
    assert decoder_forward(model, [3, 2], labelled=2) == 2 * layer * 5 + 4 * pairs * 4 + 2 * 2 * 10 * 4


def test_documents_cost_less_attention_than_one_sequence() -> None:
    assert decoder_forward(LONG_VITA_14B, [512] * 4, 0) < decoder_forward(LONG_VITA_14B, [2048], 0)


def test_frozen_parts_cost_less() -> None:
    free = step_flops(stage(), tiles_per_pack=60, labelled_fraction=0.5)
    aligned = stage(
        train=TrainConfig(bf16=True, global_batch_size=8, freeze_language_model=True, freeze_vision_model=True)
    )
    frozen = step_flops(aligned, tiles_per_pack=60, labelled_fraction=0.5)
    assert 0.55 < frozen / free < 0.7
    assert tower_forward(LONG_VITA_14B, 2) == 2 * tower_forward(LONG_VITA_14B, 1) > 0


def test_memory_falls_with_ranks_and_recompute() -> None:
    plain = estimate_memory(stage(), 8)
    assert plain.weights == pytest.approx(2 * (14_770_033_664 / 8 + 304_012_288 + 9_445_376), rel=1e-6)
    more = estimate_memory(stage(), 64)
    assert more.optimizer == pytest.approx(plain.optimizer / 8)
    full = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    assert estimate_memory(stage(parallel=full), 8).activations < plain.activations / 5
    with pytest.raises(ConfigError, match="Launch a multiple of 8"):
        estimate_memory(stage(), 12)
