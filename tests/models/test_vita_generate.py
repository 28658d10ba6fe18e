"""A KV cache changes nothing: prefill and decoding give the logits of one full forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_vita.config import ModelConfig, ParallelConfig
from megatron_vita.errors import ConfigError
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.context import KVCache, PackedSeqContext
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups
from tests.models.parity import GLM, MODEL, TOKENS_PER_TILE, VISION, stage_of
from tests.ranks import run_ranks

LENGTHS = (11, 7, 16)


def _forward(
    model: VitaModel, groups: Groups, tokens: list[torch.Tensor], starts: list[int], cache: KVCache | None, **tiles: Any
) -> torch.Tensor:
    """Logits of every token of documents that begin at the given positions, [sum of lengths, vocabulary]."""
    documents = tuple(len(one) for one in tokens)
    spare = -sum(documents) % groups.sequence_shards  # sequence parallelism needs a multiple: a document of padding
    layout = SequenceLayout(documents + (spare,) * bool(spare), sp=groups.sequence_shards)
    packed_seq = torch.cat([*tokens, torch.zeros(spare, dtype=torch.int64)])[None]
    positions = [torch.arange(len(one)) + start for one, start in zip(tokens, starts, strict=True)]
    routes = TileRoutes(layout, np.array(tiles.get("first", []), dtype=np.int64), TOKENS_PER_TILE, tp=groups.tp_size)
    pixels = tiles.get("pixels", torch.zeros(0, 3, VISION.image_size, VISION.image_size, dtype=torch.uint8))
    with torch.no_grad():
        return model(
            tokens=packed_seq,
            positions=torch.cat([*positions, torch.arange(spare)])[None],
            layout=layout,
            routes=routes,
            tiles=pixels[list(routes.tiles_of(groups.group_rank))],
            logits_indices=torch.arange(sum(documents)),
            cache=cache,
        )


def _check_cache(parallel: dict[str, Any], settings: ModelConfig) -> None:
    groups = build_groups(ParallelConfig(**parallel))
    (model,) = build_model(stage_of(parallel, model=settings), groups, dtype=torch.float64)
    model.eval()
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, MODEL.vocab_size, (length,), generator=generator) for length in LENGTHS]
    pixels = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    whole = _forward(model, groups, texts, [0, 0, 0], None, first=[2], pixels=pixels).split(LENGTHS)
    prompts = [8, 4, 9]
    cache = KVCache(3)
    first = [text[:count] for text, count in zip(texts, prompts, strict=True)]
    got = _forward(model, groups, first, [0, 0, 0], cache, first=[2], pixels=pixels).split(prompts)
    for one, want, count in zip(got, whole, prompts, strict=True):
        torch.testing.assert_close(one, want[:count])
    done = list(prompts)
    # Several tokens at once, one at a time; then sequence 0 is finished and leaves, then sequence 1.
    current = [0, 1, 2]
    for counts in ({0: 2, 1: 1, 2: 3}, {0: 1, 1: 1, 2: 1}, {1: 1, 2: 1}, {2: 2}):
        if len(counts) < len(current):
            cache.keep([current.index(one) for one in counts])
            current = list(counts)
        new = [texts[one][done[one] : done[one] + count] for one, count in counts.items()]
        out = _forward(model, groups, new, [done[one] for one in counts], cache).split(list(counts.values()))
        for (one, count), logits in zip(counts.items(), out, strict=True):
            torch.testing.assert_close(logits, whole[one][done[one] : done[one] + count])
            done[one] += count
    destroy_groups()


@pytest.mark.parametrize(
    ("world", "parallel", "settings"),
    [
        (1, {}, MODEL),
        (1, {}, GLM),
        (2, {"tensor_model_parallel_size": 2}, MODEL),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, MODEL),
    ],
    ids=["one rank", "GLM-4", "tp", "sp"],
)
def test_cached_decoding_equals_a_full_forward(world: int, parallel: dict[str, Any], settings: ModelConfig) -> None:
    run_ranks(world, _check_cache, parallel, settings)


def _check_refusals() -> None:
    groups = build_groups(ParallelConfig())
    (model,) = build_model(stage_of({}), groups)
    cache = KVCache(2)
    with pytest.raises(ConfigError, match="forget finished ones"):
        _forward(model, groups, [torch.tensor([1, 2])], [0], cache)
    destroy_groups()


def test_a_sequence_without_a_document_is_refused() -> None:
    run_ranks(1, _check_refusals)


def test_cache_grows_and_forgets() -> None:
    cpu = torch.device("cpu")
    cache = KVCache(2)
    key = torch.arange(12.0).view(6, 1, 2)
    keys, values = cache.append(1, key, -key, cache.plan((2, 3, 1), cpu))  # the last token is padding
    assert keys.shape == (2, 3, 1, 2)
    torch.testing.assert_close(keys[1], key[2:5])
    torch.testing.assert_close(values[0, 2], torch.zeros(1, 2))
    cache.advance((2, 3, 1))
    assert cache.lengths == [2, 3]
    long = torch.ones(101, 1, 2)
    keys, _ = cache.append(1, long, long, cache.plan((1, 100), cpu))
    torch.testing.assert_close(keys[1, :3], key[2:5])
    assert keys.shape[1] == 103
    cache.advance((1, 100))
    cache.keep([1])
    assert cache.lengths == [103]
    with pytest.raises(ConfigError, match="context_parallel_size=1"):
        PackedSeqContext(layout=SequenceLayout((4, 4), cp=2), cache=cache).decoding(cpu)
