"""Test inputs of the grid: a tiny model for a layout, its weights, and packs of documents with tiles."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vita import seed
from megatron_vita.checks.plain import shapes
from megatron_vita.config import ModelConfig, VisionConfig

_SEED = 20
DOCUMENTS = ((33, 13, 9, 1, 7), (40, 2, 16, 5))
"""Document lengths of even and odd packs. The first is long enough that its first tokens have one owner at CP 4; the
others leave remainders in every layout."""
TOKENS = sum(DOCUMENTS[0])
"""Tokens of a pack before padding."""
IMAGES = ("everywhere", "one-rank", "one-batch", "none", "straddling")
"""Where tiles stand: on both sides of every boundary; in the first tokens of a pack, so that other ranks have none; not
in the second half of the packs, so that whole micro-batches have none; nowhere; one after another over the whole pack,
so that tiles are cut by rank boundaries."""


@dataclass(frozen=True)
class Pack:
    """Concatenated documents, as one pack of the shards."""

    documents: tuple[int, ...]
    """Tokens of each."""
    tokens: Tensor
    """int64 [tokens]."""
    labels: Tensor
    """int64 [tokens], already shifted, -100 where there is no loss."""
    tiles: Tensor
    """uint8 [k, 3, S, S]."""
    first_token: tuple[int, ...]
    """Position of each tile's first feature."""


VITS: dict[str, dict[str, Any]] = {
    "intern_vit": {},
    "intern_vit_6b": {"normalization": "RMSNorm", "add_qkv_bias": False, "qk_layernorm": True},
    "siglip": {"model_type": "siglip", "image_norm": "siglip"},
    "clip": {"model_type": "clip", "image_norm": "clip", "norm_epsilon": 1e-5},
}
"""Settings of towers that differ from the default; see config.VisionConfig."""
_YARN = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,  # less than the longest document
}
LLMS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 16, **_YARN},
    "llama": {"add_qkv_bias": False, "rope_scaling_factor": 8.0},
    "glm": {"rotary_percent": 0.5, "rotary_interleaved": True},
}
"""Settings of decoders that differ from the default; see config.ModelConfig."""


def tiny_model(
    *,
    heads: int = 4,
    layers: int = 4,
    tied: bool = False,
    vit: str = "intern_vit",
    llm: str = "qwen2",
    split: bool = False,
) -> ModelConfig:
    """A model of `heads` key/value heads (twice as many query heads) and `layers` layers that a layout can split.

    Args:
        heads: of keys and values, and of the tower.
        layers: of the decoder.
        tied: the head is the embedding table.
        vit: one of VITS.
        llm: one of LLMS.
        split: the tower is tensor-parallel.
    """
    return ModelConfig(
        num_layers=layers,
        hidden_size=16 * heads,  # heads of 8, the narrowest that flash kernels take
        ffn_hidden_size=24 * heads,
        num_attention_heads=2 * heads,
        num_query_groups=heads,
        vocab_size=37,
        untie_embeddings_and_output_weights=not tied,
        vision=shrink_tower(VisionConfig(tensor_parallel=split, **VITS[vit]), heads),
        **LLMS[llm],
    )


def shrink_tower(vision: VisionConfig, heads: int) -> VisionConfig:
    """A tower of the same kind with two blocks, `heads` heads and tiles of 16 patches."""
    return dataclasses.replace(
        vision,
        num_layers=1 - vision.selected_layer,
        hidden_size=4 * heads,
        ffn_hidden_size=6 * heads,
        num_attention_heads=heads,
        image_size=16,
        patch_size=4,
    )


def draw_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Random whole weights, float32, each from a seed of its own name. Biases, norms and layer scales are random too:
    a factor of one or a sum with zero would hide that it is missing."""
    out = {}
    for name, shape in shapes(model):
        noise = torch.empty(shape).normal_(generator=seed.generator(_SEED, "weights", name))
        leaf = name.rsplit(".", 1)[-1]
        if ("norm" in name or ".ln_" in name) and leaf.endswith("weight"):
            out[name] = 1 + 0.2 * noise
        elif leaf in ("ls1", "ls2"):
            out[name] = 0.5 + 0.1 * noise
        elif leaf.endswith("bias"):
            out[name] = 0.1 * noise
        elif len(shape) > 1 and "embeddings" not in name and leaf != "class_token":
            out[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            out[name] = 0.5 * noise
    return out


def make_packs(model: ModelConfig, count: int, images: str) -> list[Pack]:
    """The packs of one global batch. Pack i holds the same documents and labels whatever the images and the count."""
    return [_pack(model, index, _places(index, count, images, model.vision)) for index in range(count)]


def _pack(model: ModelConfig, index: int, first_token: tuple[int, ...]) -> Pack:
    documents = DOCUMENTS[index % 2]
    source = seed.generator(_SEED, "pack", index)
    tokens = torch.randint(0, model.vocab_size, (TOKENS,), generator=source)
    labels = torch.randint(0, model.vocab_size, (TOKENS,), generator=source)
    labels[torch.rand(TOKENS, generator=source) < 0.6] = -100
    labels[TOKENS - documents[-1] :] = -100  # one document has no label at all
    size = model.vision.image_size if model.vision else 1
    tiles = torch.randint(0, 256, (len(first_token), 3, size, size), generator=source, dtype=torch.uint8)
    return Pack(documents, tokens, labels, tiles, first_token)


def _places(index: int, count: int, images: str, vision: VisionConfig | None) -> tuple[int, ...]:
    """First tokens of a pack's tiles."""
    if vision is None or images == "none" or (images == "one-batch" and 2 * index >= count):
        return ()
    if images == "one-rank":
        return (0,)
    if images == "straddling":
        return tuple(range(1 + index % 2, TOKENS - vision.tokens_per_tile + 1, vision.tokens_per_tile))
    return (2, 14, 22, 31, 44, 52) if index % 2 else (1, 9, 30, 40, 51)
