"""The tower, the projector and the whole model against stock transformers with the same weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vita.config import IMAGE_NORMS, ModelConfig, StageConfig, VisionConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.ranks import run_ranks

# Head sizes are no powers of four, so that the scale 1/sqrt(d) really rounds; the grid is not square in 2 x 2 cells.
VISION = VisionConfig(
    num_layers=3, hidden_size=40, ffn_hidden_size=72, num_attention_heads=2, image_size=24, patch_size=4
)
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=211,
    init_method_std=0.2,
    vision=dataclasses.replace(VISION, init_method_std=0.2, layer_scale_init=0.5),
)
CONTEXT = 210


def _stock() -> Any:
    pytest.importorskip("transformers")
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    text = Qwen2Config(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups,
        rms_norm_eps=MODEL.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rotary_base},
        tie_word_embeddings=False,
    )
    vision = InternVLVisionConfig(
        hidden_size=VISION.hidden_size,
        num_hidden_layers=VISION.num_layers,
        num_attention_heads=VISION.num_attention_heads,
        intermediate_size=VISION.ffn_hidden_size,
        attention_bias=True,
        image_size=[VISION.image_size] * 2,
        patch_size=[VISION.patch_size] * 2,
        layer_norm_eps=VISION.norm_epsilon,
        use_mean_pooling=True,
    )
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=CONTEXT,
        image_seq_length=VISION.tokens_per_tile,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    return InternVLForConditionalGeneration(config).float().eval()


def _pairs(mcore: VitaModel, hf: Any) -> list[tuple[torch.nn.Parameter, list[tuple[torch.nn.Parameter, Any]]]]:
    """(mcore parameter, [(hf parameter, rows of the mcore parameter that it fills)]), written out by hand."""
    pairs: list[tuple[torch.nn.Parameter, list[tuple[torch.nn.Parameter, Any]]]] = []

    def same(mine: torch.nn.Parameter, other: torch.nn.Parameter) -> None:
        pairs.append((mine, [(other, slice(None))]))

    def qkv(linear: Any, projections: list[Any], heads: int, groups: int, size: int) -> None:
        """Per key/value group: its query rows, its key rows, its value rows."""
        each = heads // groups
        rows: list[list[int]] = [[], [], []]
        for group in range(groups):
            start = group * (each + 2) * size
            rows[0] += range(start, start + each * size)
            rows[1] += range(start + each * size, start + (each + 1) * size)
            rows[2] += range(start + (each + 1) * size, start + (each + 2) * size)
        for leaf in ("weight", "bias"):
            others = [(getattr(one, leaf), index) for one, index in zip(projections, rows, strict=True)]
            pairs.append((getattr(linear, leaf), others))

    tower, stock = mcore.vision_model, hf.model.vision_tower
    same(tower.class_token, stock.embeddings.cls_token)
    same(tower.position_embeddings.weight, stock.embeddings.position_embeddings)
    same(tower.conv1.weight, stock.embeddings.patch_embeddings.projection.weight)
    same(tower.conv1.bias, stock.embeddings.patch_embeddings.projection.bias)
    size = VISION.hidden_size // VISION.num_attention_heads
    for mine, other in zip(tower.decoder.layers, stock.encoder.layer, strict=True):
        attention = other.attention
        heads = VISION.num_attention_heads
        qkv(mine.self_attention.linear_qkv, [attention.q_proj, attention.k_proj, attention.v_proj], heads, heads, size)
        same(mine.ls1, other.lambda_1)
        same(mine.ls2, other.lambda_2)
        for leaf in ("weight", "bias"):
            same(getattr(mine.input_layernorm, leaf), getattr(other.layernorm_before, leaf))
            same(getattr(mine.pre_mlp_layernorm, leaf), getattr(other.layernorm_after, leaf))
            same(getattr(mine.self_attention.linear_proj, leaf), getattr(attention.projection_layer, leaf))
            same(getattr(mine.mlp.linear_fc1, leaf), getattr(other.mlp.fc1, leaf))
            same(getattr(mine.mlp.linear_fc2, leaf), getattr(other.mlp.fc2, leaf))
    for leaf in ("weight", "bias"):
        projector = hf.model.multi_modal_projector
        same(getattr(mcore.vision_projection.pre_proj_layernorm, leaf), getattr(projector.layer_norm, leaf))
        same(getattr(mcore.vision_projection.encoder.linear_fc1, leaf), getattr(projector.linear_1, leaf))
        same(getattr(mcore.vision_projection.encoder.linear_fc2, leaf), getattr(projector.linear_2, leaf))
    decoder, text = mcore.language_model, hf.model.language_model
    same(decoder.embedding.word_embeddings.weight, text.embed_tokens.weight)
    same(decoder.decoder.final_layernorm.weight, text.norm.weight)
    same(decoder.output_layer.weight, hf.lm_head.weight)
    for mine, other in zip(decoder.decoder.layers, text.layers, strict=True):
        attention = other.self_attn
        heads, groups = MODEL.num_attention_heads, MODEL.num_query_groups
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv(mine.self_attention.linear_qkv, projections, heads, groups, MODEL.head_dim)
        same(mine.self_attention.linear_proj.weight, attention.o_proj.weight)
        same(mine.input_layernorm.weight, other.input_layernorm.weight)
        same(mine.pre_mlp_layernorm.weight, other.post_attention_layernorm.weight)
        half = MODEL.ffn_hidden_size
        gate_up = [(other.mlp.gate_proj.weight, slice(0, half)), (other.mlp.up_proj.weight, slice(half, None))]
        pairs.append((mine.mlp.linear_fc1.weight, gate_up))
        same(mine.mlp.linear_fc2.weight, other.mlp.down_proj.weight)
    return pairs


def _stirred(model: VitaModel) -> VitaModel:
    """Biases and norms away from zero and one, so that a lost one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _check_against_stock() -> None:
    groups = build_groups(StageConfig().parallel)
    (mcore,) = build_model(StageConfig(model=MODEL), groups)
    _stirred(mcore).eval()
    hf = _stock()
    pairs = _pairs(mcore, hf)
    assert {id(mine) for mine, _ in pairs} == {id(one) for one in mcore.parameters()}
    assert len({id(other) for _, others in pairs for other, _ in others}) == len(list(hf.parameters()))
    with torch.no_grad():
        for mine, others in pairs:
            for other, rows in others:
                other.copy_(mine[rows].reshape(other.shape))

    tiles = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in IMAGE_NORMS["imagenet"])
    pixels = (tiles.float() / 255 - mean) / std

    want = hf.model.vision_tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(mcore.vision_model(tiles), want, rtol=1e-4, atol=1e-4)
    features = mcore.encode(tiles)
    want = hf.model.multi_modal_projector(
        hf.model.pixel_shuffle(want.reshape(3, 6, 6, -1), scale_factor=0.5).flatten(1, 2)
    )
    torch.testing.assert_close(features, want.flatten(0, 1), rtol=1e-4, atol=1e-4)

    count = VISION.tokens_per_tile
    tokens = torch.randint(0, CONTEXT, (60,), generator=torch.Generator().manual_seed(2))
    starts = np.array([4, 15, 40])
    for start in starts:
        tokens[start : start + count] = CONTEXT
    layout = SequenceLayout((60,))
    routes = TileRoutes(layout, starts, count)
    positions = torch.arange(60)[None]
    inputs = {"tokens": tokens[None], "positions": positions, "layout": layout, "routes": routes, "tiles": tiles}
    logits = mcore(**inputs, logits_indices=torch.arange(60))
    want = hf(input_ids=tokens[None], pixel_values=pixels).logits[0]
    assert float(want.abs().max()) > 1, "logits too small to compare"
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)

    labels = torch.full((60,), -100)
    labels[30:59] = tokens[31:60]
    mcore(**inputs, labels=labels[None]).sum().backward()
    torch.nn.functional.cross_entropy(want, labels, reduction="sum").backward()
    for mine, others in pairs:
        scale = float(mine.grad.abs().max())
        for other, rows in others:
            torch.testing.assert_close(
                mine.grad[rows].reshape(other.shape), other.grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-2)
            )
    destroy_groups()


def test_features_logits_and_gradients_equal_stock_transformers() -> None:
    _stock()  # imports transformers in the parent, once
    run_ranks(1, _check_against_stock)
