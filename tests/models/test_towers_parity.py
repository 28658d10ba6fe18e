"""Every tower family against its stock transformers module, with the same weights: states, and gradients of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vita.config import IMAGE_NORMS, ModelConfig, ParallelConfig, StageConfig, VisionConfig
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.ranks import run_ranks

SHAPE: dict[str, Any] = {
    "hidden_size": 40,
    "ffn_hidden_size": 72,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "init_method_std": 0.2,
}
TOWERS = {
    "internvl": VisionConfig(num_layers=3, layer_scale_init=0.5, **SHAPE),
    "internvl 6b": VisionConfig(
        num_layers=3,
        layer_scale_init=0.5,
        normalization="RMSNorm",
        add_qkv_bias=False,
        qk_layernorm=True,
        **SHAPE,
    ),
    "siglip": VisionConfig(model_type="siglip", num_layers=3, image_norm="siglip", **SHAPE),
    "siglip -2": VisionConfig(model_type="siglip", num_layers=3, image_norm="siglip", select_layer=-2, **SHAPE),
    "clip": VisionConfig(model_type="clip", num_layers=3, image_norm="clip", norm_epsilon=1e-5, **SHAPE),
    "clip -1": VisionConfig(
        model_type="clip", num_layers=3, image_norm="clip", norm_epsilon=1e-5, select_layer=-1, **SHAPE
    ),
}


def _stock(vision: VisionConfig) -> Any:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        InternVLVisionConfig,
        InternVLVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    common = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "layer_norm_eps": vision.norm_epsilon,
    }
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    if vision.model_type == "siglip":
        config = SiglipVisionConfig(**common, **sides, vision_use_head=False)
        model, kind = config, SiglipVisionModel
    elif vision.model_type == "clip":
        model, kind = CLIPVisionConfig(**common, **sides), CLIPVisionModel
    else:
        model = InternVLVisionConfig(
            **common,
            image_size=[vision.image_size] * 2,
            patch_size=[vision.patch_size] * 2,
            attention_bias=vision.add_qkv_bias,
            use_qk_norm=vision.qk_layernorm,
            norm_type="rms_norm" if vision.normalization == "RMSNorm" else "layer_norm",
            use_mean_pooling=True,
        )
        kind = InternVLVisionModel
    model._attn_implementation = "eager"
    return kind(model).float().eval()


def _embeddings(tower: Any, stock: Any) -> list[tuple[Any, Any]]:
    """(mcore module, hf module) of everything before and after the blocks."""
    inner = getattr(stock, "vision_model", stock)
    embeddings = inner.embeddings
    if tower.vision.model_type == "intern_vit":
        patch = embeddings.patch_embeddings.projection
        pairs = [(tower.class_token, embeddings.cls_token)]
        pairs += [(tower.position_embeddings.weight, embeddings.position_embeddings)]
    else:
        patch = embeddings.patch_embedding
        pairs = [(tower.position_embeddings.weight, embeddings.position_embedding.weight)]
    pairs += [(tower.conv1.weight, patch.weight)]
    if tower.vision.model_type == "clip":
        pairs += [(tower.class_token, embeddings.class_embedding)]
        pairs += [(getattr(tower.ln_pre, leaf), getattr(inner.pre_layrnorm, leaf)) for leaf in ("weight", "bias")]
    else:
        pairs += [(tower.conv1.bias, patch.bias)]
    if tower.vision.post_norm:
        pairs += [(getattr(tower.ln_post, leaf), getattr(inner.post_layernorm, leaf)) for leaf in ("weight", "bias")]
    return pairs


def _block(mine: Any, other: Any, vision: VisionConfig) -> list[tuple[Any, Any]]:
    """(mcore module, hf module) of one block; a list of hf modules where mcore fuses queries, keys and values."""
    if vision.model_type == "intern_vit":
        norms, attention = (other.layernorm_before, other.layernorm_after), other.attention
        proj = attention.projection_layer
        pairs: list[tuple[Any, Any]] = [(mine.ls1, other.lambda_1), (mine.ls2, other.lambda_2)]
    else:
        norms, attention = (other.layer_norm1, other.layer_norm2), other.self_attn
        proj, pairs = attention.out_proj, []
    if vision.qk_layernorm:
        pairs += [(mine.self_attention.q_layernorm.weight, attention.q_norm.weight)]
        pairs += [(mine.self_attention.k_layernorm.weight, attention.k_norm.weight)]
    modules = [
        (mine.input_layernorm, norms[0]),
        (mine.pre_mlp_layernorm, norms[1]),
        (mine.self_attention.linear_proj, proj),
        (mine.mlp.linear_fc1, other.mlp.fc1),
        (mine.mlp.linear_fc2, other.mlp.fc2),
    ]
    for mcore, hf in modules:
        pairs += [(one, dict(hf.named_parameters())[leaf]) for leaf, one in mcore.named_parameters()]
    three = [attention.q_proj, attention.k_proj, attention.v_proj]
    for leaf, one in mine.self_attention.linear_qkv.named_parameters():
        pairs += [(one, [getattr(part, leaf) for part in three])]
    return pairs


def _joined(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """[Q], [K], [V] -> per head its query, key and value rows."""
    by_head = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], dim=1)
    return by_head.flatten(0, 2)


def _check(name: str) -> None:
    vision = TOWERS[name]
    groups = build_groups(ParallelConfig())
    (model,) = build_model(StageConfig(model=ModelConfig(vocab_size=11, vision=vision)), groups)
    tower, stock = model.vision_model, _stock(vision)
    inner = getattr(stock, "vision_model", stock)
    blocks = inner.encoder.layer if vision.model_type == "intern_vit" else inner.encoder.layers
    pairs = _embeddings(tower, stock)
    for mine, other in zip(tower.decoder.layers, blocks, strict=False):
        pairs += _block(mine, other, vision)
    assert {id(one) for one, _ in pairs} == {id(one) for one in tower.parameters()}, "every parameter is compared"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, hf in pairs:
            for one in hf if isinstance(hf, list) else [hf]:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.2)
            source = _joined(hf, vision.num_attention_heads) if isinstance(hf, list) else hf
            mine.copy_(source.reshape(mine.shape))
    tiles = torch.randint(0, 256, (3, 3, 24, 24), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in IMAGE_NORMS[vision.image_norm])
    out = stock((tiles.float() / 255 - mean) / std, output_hidden_states=True)
    want = out.last_hidden_state if vision.selected_layer == -1 else out.hidden_states[vision.selected_layer]
    if vision.model_type == "clip" and vision.selected_layer == -1:
        want = out.hidden_states[-1]
    want = want[:, 1:] if vision.family.class_token else want
    got = tower(tiles)
    assert float(want.abs().max()) > 0.5, "states too small to compare"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grad = torch.randn(want.shape, generator=generator)
    got.backward(grad)
    want.backward(grad)
    for mine, hf in pairs:
        hf_grad = _joined([one.grad for one in hf], 2) if isinstance(hf, list) else hf.grad
        scale = float(hf_grad.abs().max())
        torch.testing.assert_close(mine.grad, hf_grad.reshape(mine.shape), rtol=1e-3, atol=1e-4 * max(scale, 1e-2))
    destroy_groups()


@pytest.mark.parametrize("name", TOWERS)
def test_states_and_gradients_equal_stock_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    _stock(TOWERS[name])  # imports transformers in the parent, once
    run_ranks(1, _check, name)
