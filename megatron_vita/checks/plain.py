"""Reference implementation of the whole model in PyTorch: one process, no megatron-core, no code under test.

It is the reference implementation of `tools/check_parallel.py` and the baseline of `benchmarks/overhead.py`. Written
from the published models' definitions and from the names and shapes of our checkpoints, it shares no code with `models`
and `parallel`, so that one mistake cannot be in both.

Legend: n tokens of a packed sequence, h decoder width, f MLP width, q query heads, g key/value heads, d head size,
v vocabulary; H tower width, F tower MLP width, P patch side, p patches of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vita.checks.plain_rotary import frequencies, rotate
from megatron_vita.config import IMAGE_NORMS, ModelConfig, VisionConfig

Weights = Mapping[str, Tensor]
"""Unsharded tensors by checkpoint key."""


def shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the order in which a forward pass meets them.

    `linear_qkv` holds, for each key/value head, its q/g query heads, then its key, then its value; `linear_fc1` of the
    decoder is [gate; up]. Tied embeddings have no `output_layer`.
    """
    if model.vision is not None:
        yield from _tower_shapes(model.vision)
        yield from _projector_shapes(model, model.vision)
    h, f, d, v = model.hidden_size, model.ffn_hidden_size, model.head_dim, model.vocab_size
    q, g = model.num_attention_heads, model.num_query_groups
    yield "language_model.embedding.word_embeddings.weight", (v, h)
    for layer in range(model.num_layers):
        at = f"language_model.decoder.layers.{layer}."
        yield at + "self_attention.linear_qkv.layer_norm_weight", (h,)
        yield at + "self_attention.linear_qkv.weight", ((q + 2 * g) * d, h)
        if model.add_qkv_bias:
            yield at + "self_attention.linear_qkv.bias", ((q + 2 * g) * d,)
        if model.qk_layernorm:
            yield at + "self_attention.q_layernorm.weight", (d,)
            yield at + "self_attention.k_layernorm.weight", (d,)
        yield at + "self_attention.linear_proj.weight", (h, q * d)
        yield at + "mlp.linear_fc1.layer_norm_weight", (h,)
        yield at + "mlp.linear_fc1.weight", (2 * f, h)
        yield at + "mlp.linear_fc2.weight", (h, f)
    yield "language_model.decoder.final_layernorm.weight", (h,)
    if model.untie_embeddings_and_output_weights:
        yield "language_model.output_layer.weight", (v, h)


def _tower_shapes(vision: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, inner, patch, family = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size, vision.family
    yield "vision_model.conv1.weight", (wide, 3, patch, patch)
    if family.patch_bias:
        yield "vision_model.conv1.bias", (wide,)
    if family.class_token:
        yield "vision_model.class_token", (1, 1, wide)
    yield "vision_model.position_embeddings.weight", (vision.num_patches + family.class_token, wide)
    if family.pre_norm:
        yield "vision_model.ln_pre.weight", (wide,)
        yield "vision_model.ln_pre.bias", (wide,)
    norms = ("weight", "bias") if vision.normalization == "LayerNorm" else ("weight",)
    for layer in range(vision.built_layers):
        at = f"vision_model.decoder.layers.{layer}."
        for leaf in norms:
            yield at + f"self_attention.linear_qkv.layer_norm_{leaf}", (wide,)
        yield at + "self_attention.linear_qkv.weight", (3 * wide, wide)
        if vision.add_qkv_bias:
            yield at + "self_attention.linear_qkv.bias", (3 * wide,)
        if vision.qk_layernorm:
            yield at + "self_attention.q_layernorm.weight", (wide,)
            yield at + "self_attention.k_layernorm.weight", (wide,)
        yield at + "self_attention.linear_proj.weight", (wide, wide)
        yield at + "self_attention.linear_proj.bias", (wide,)
        if family.layer_scale:
            yield at + "ls1", (wide,)
        for leaf in norms:
            yield at + f"mlp.linear_fc1.layer_norm_{leaf}", (wide,)
        yield at + "mlp.linear_fc1.weight", (inner, wide)
        yield at + "mlp.linear_fc1.bias", (inner,)
        yield at + "mlp.linear_fc2.weight", (wide, inner)
        yield at + "mlp.linear_fc2.bias", (wide,)
        if family.layer_scale:
            yield at + "ls2", (wide,)
    if vision.post_norm:
        yield "vision_model.ln_post.weight", (wide,)
        yield "vision_model.ln_post.bias", (wide,)


def _projector_shapes(model: ModelConfig, vision: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    joined, inner, h = 4 * vision.hidden_size, model.projector_width, model.hidden_size
    at = "vision_projection."
    yield at + "pre_proj_layernorm.weight", (joined,)
    yield at + "pre_proj_layernorm.bias", (joined,)
    for name, out, into in (("fc1", inner, joined), ("fc2", h, inner)):
        yield at + f"encoder.linear_{name}.weight", (out, into)
        if model.projector.bias:
            yield at + f"encoder.linear_{name}.bias", (out,)


def token_losses(
    weights: Weights,
    model: ModelConfig,
    *,
    tokens: Tensor,
    labels: Tensor,
    documents: Sequence[int],
    tiles: Tensor,
    first_token: Sequence[int],
) -> Tensor:
    """Loss of every labelled token of one packed sequence.

    Args:
        weights: see `shapes`; their dtype is the arithmetic's.
        model: the settings.
        tokens: int64 [n].
        labels: int64 [n], already shifted, -100 where there is no loss.
        documents: lengths whose sum is n; attention and positions restart at each.
        tiles: uint8 [k, 3, S, S].
        first_token: for each tile, the token where its features begin; they take the tokens_per_tile from there on.

    Returns:
        [labelled tokens].
    """
    states = weights["language_model.embedding.word_embeddings.weight"][tokens]
    if len(tiles):
        assert model.vision is not None, "tiles need a tower"
        features = project(weights, model, tower(weights, model.vision, tiles))
        per_tile = model.vision.tokens_per_tile
        places = torch.cat([torch.arange(first, first + per_tile) for first in first_token]).to(tokens.device)
        states = states.index_put((places,), features.flatten(0, 1))
    states = decode(weights, model, states, documents)
    tied = not model.untie_embeddings_and_output_weights
    head = weights["language_model.embedding.word_embeddings.weight" if tied else "language_model.output_layer.weight"]
    labelled = labels >= 0
    logits = states[labelled] @ head.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels[labelled], reduction="none")


def decode(weights: Weights, model: ModelConfig, states: Tensor, documents: Sequence[int]) -> Tensor:
    """The decoder of Qwen2, Qwen3, Llama or GLM-4 and its final norm, [n, h] -> [n, h]."""
    n, d, q, g = len(states), model.head_dim, model.num_attention_heads, model.num_query_groups
    lengths = torch.tensor(documents)
    document = torch.repeat_interleave(torch.arange(len(documents)), lengths).to(states.device)
    token = torch.arange(n, device=states.device)
    start = token.new_tensor([0, *documents[:-1]]).cumsum(0)[document]
    visible = (document[:, None] == document[None, :]) & (token[:, None] >= token[None, :])
    # Published models compute the angles in float32, whatever the weights are.
    frequency, scale = frequencies(model)
    angles = (token - start).float()[:, None] * frequency.to(states.device)
    cos, sin = ((scale * one).to(states.dtype)[:, None] for one in (angles.cos(), angles.sin()))
    for layer in range(model.num_layers):
        at = f"language_model.decoder.layers.{layer}."
        x = _rms_norm(states, weights[at + "self_attention.linear_qkv.layer_norm_weight"], model.norm_epsilon)
        bias = weights[at + "self_attention.linear_qkv.bias"] if model.add_qkv_bias else None
        qkv = F.linear(x, weights[at + "self_attention.linear_qkv.weight"], bias).view(n, g, q // g + 2, d)
        query, key, value = qkv.split([q // g, 1, 1], dim=2)
        query, key = query.reshape(n, q, d), key.squeeze(2)
        if model.qk_layernorm:
            query = _rms_norm(query, weights[at + "self_attention.q_layernorm.weight"], model.norm_epsilon)
            key = _rms_norm(key, weights[at + "self_attention.k_layernorm.weight"], model.norm_epsilon)
        query, key = (rotate(one, cos, sin, model.rotary_interleaved) for one in (query, key))
        key, value = (one.repeat_interleave(q // g, dim=1) for one in (key, value.squeeze(2)))
        query, key, value = (one.transpose(0, 1)[None] for one in (query, key, value))  # [1, q, n, d]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        mixed = mixed[0].transpose(0, 1).reshape(n, q * d)
        states = states + F.linear(mixed, weights[at + "self_attention.linear_proj.weight"])
        x = _rms_norm(states, weights[at + "mlp.linear_fc1.layer_norm_weight"], model.norm_epsilon)
        gate, up = F.linear(x, weights[at + "mlp.linear_fc1.weight"]).chunk(2, dim=-1)
        states = states + F.linear(F.silu(gate) * up, weights[at + "mlp.linear_fc2.weight"])
    return _rms_norm(states, weights["language_model.decoder.final_layernorm.weight"], model.norm_epsilon)


def tower(weights: Weights, vision: VisionConfig, tiles: Tensor) -> Tensor:
    """The tower of any family, uint8 [k, 3, S, S] -> [k, p, H]: states of the selected block, class token dropped."""
    patch = weights["vision_model.conv1.weight"]
    mean, std = (torch.tensor(one, device=tiles.device).view(3, 1, 1) * 255 for one in IMAGE_NORMS[vision.image_norm])
    pixels = ((tiles.float() - mean) / std).to(patch.dtype)  # pixels are normalised in float32, as image processors do
    states = F.conv2d(pixels, patch, weights.get("vision_model.conv1.bias"), stride=vision.patch_size)
    states = states.flatten(2).transpose(1, 2)
    if vision.family.class_token:
        states = torch.cat([weights["vision_model.class_token"].expand(len(tiles), -1, -1), states], dim=1)
    states = states + weights["vision_model.position_embeddings.weight"]
    states = _maybe_norm(weights, "vision_model.ln_pre", vision, states)
    for layer in range(vision.built_layers):
        at = f"vision_model.decoder.layers.{layer}."
        states = states + weights.get(at + "ls1", 1.0) * _tower_attention(
            weights, vision, at + "self_attention.", states
        )
        x = _linear(weights, at + "mlp.linear_fc1", _tower_norm(weights, at + "mlp.linear_fc1", vision, states))
        x = _linear(weights, at + "mlp.linear_fc2", _tower_activation(vision, x))
        states = states + weights.get(at + "ls2", 1.0) * x
    states = _maybe_norm(weights, "vision_model.ln_post", vision, states)
    return states[:, 1:] if vision.family.class_token else states


def _tower_activation(vision: VisionConfig, x: Tensor) -> Tensor:
    if vision.model_type == "clip":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if vision.model_type == "siglip" else "none")


def _tower_attention(weights: Weights, vision: VisionConfig, at: str, states: Tensor) -> Tensor:
    k, n, wide = states.shape
    heads = vision.num_attention_heads
    x = _tower_norm(weights, at + "linear_qkv", vision, states)
    qkv = _linear(weights, at + "linear_qkv", x).view(k, n, heads, 3, wide // heads)
    query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # [k, heads, n, d]
    if vision.qk_layernorm:
        query = _norm_of_all_heads(query, weights[at + "q_layernorm.weight"], vision.norm_epsilon)
        key = _norm_of_all_heads(key, weights[at + "k_layernorm.weight"], vision.norm_epsilon)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(k, n, wide)
    return _linear(weights, at + "linear_proj", mixed)


def _norm_of_all_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[k, heads, n, d]: InternViT-6B's RMSNorm of a patch's queries, or keys, over all heads together."""
    k, heads, n, d = x.shape
    normed = _rms_norm(x.transpose(1, 2).reshape(k, n, heads * d), weight, eps)
    return normed.view(k, n, heads, d).transpose(1, 2)


def project(weights: Weights, model: ModelConfig, patches: Tensor) -> Tensor:
    """InternVL's pixel shuffle (version 2) and projector, [k, p, H] -> [k, p / 4, h]."""
    k, p, wide = patches.shape
    side = round(p**0.5)
    x = patches.view(k, side, side // 2, 2 * wide).permute(0, 2, 1, 3)
    x = x.reshape(k, side // 2, side // 2, 4 * wide).permute(0, 2, 1, 3).reshape(k, p // 4, 4 * wide)
    at = "vision_projection."
    norm = weights[at + "pre_proj_layernorm.weight"], weights[at + "pre_proj_layernorm.bias"]
    x = F.layer_norm(x, (4 * wide,), *norm, eps=model.projector.norm_epsilon)
    return _linear(weights, at + "encoder.linear_fc2", F.gelu(_linear(weights, at + "encoder.linear_fc1", x)))


def _linear(weights: Weights, at: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[at + ".weight"], weights.get(at + ".bias"))


def _tower_norm(weights: Weights, at: str, vision: VisionConfig, x: Tensor) -> Tensor:
    """The norm that checkpoints keep with the linear it feeds."""
    if vision.normalization == "RMSNorm":
        return _rms_norm(x, weights[at + ".layer_norm_weight"], vision.norm_epsilon)
    norm = weights[at + ".layer_norm_weight"], weights[at + ".layer_norm_bias"]
    return F.layer_norm(x, x.shape[-1:], *norm, eps=vision.norm_epsilon)


def _maybe_norm(weights: Weights, at: str, vision: VisionConfig, x: Tensor) -> Tensor:
    """A LayerNorm of its own, in the families that have it."""
    if at + ".weight" not in weights:
        return x
    return F.layer_norm(x, x.shape[-1:], weights[at + ".weight"], weights[at + ".bias"], eps=vision.norm_epsilon)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
