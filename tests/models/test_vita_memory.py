"""Peak memory: one encoder micro-batch for any number of tiles; no tensor larger than a rank's share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_vita.config import ParallelConfig
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.models.parity import MODEL, VISION, inputs_of, make_packed, one_step, stage_of
from tests.models.test_vita_parallel import CP2, RING2, SP2, ULYSSES2
from tests.models.watch import Watch
from tests.ranks import run_ranks

AT_ONCE = 4


def _peak(model: Any, count: int) -> int:
    """Most bytes alive while `count` tiles are encoded and, if anything trains, differentiated; less the features, and
    less what a frozen tower found, if it is kept for the projector."""
    tiles = torch.randint(0, 256, (count, 3, VISION.image_size, VISION.image_size), dtype=torch.uint8)
    share = count // 2  # a split tower takes the other half from the other rank
    mine, counts = (tiles[:share], [share, count - share]) if model.vision_model.split else (tiles, [count])
    model.zero_grad(set_to_none=True)
    grad = torch.ones(len(mine) * VISION.tokens_per_tile, MODEL.hidden_size, dtype=torch.float64)
    with Watch() as watch:
        features = model.encode(mine, counts)
        if features.requires_grad:
            features.backward(grad)
    encoded_once = features.requires_grad and not any(one.requires_grad for one in model.vision_model.parameters())
    kept = len(mine) * VISION.num_positions * VISION.hidden_size * features.element_size()
    return watch.peak - features.nbytes - (kept if encoded_once and count > AT_ONCE else 0)


def _check_flat(tensor_parallel: bool, train: dict[str, Any]) -> None:
    vision = dataclasses.replace(VISION, tensor_parallel=tensor_parallel, tiles_per_batch=AT_ONCE)
    parallel = SP2 if tensor_parallel else {}
    groups = build_groups(ParallelConfig(**parallel))
    stage = stage_of(parallel, model=dataclasses.replace(MODEL, vision=vision), **train)
    (model,) = build_model(stage, groups, dtype=torch.float64)
    one = _peak(model, AT_ONCE)
    peaks = {count: _peak(model, count) for count in (8, 64, 512)}
    assert peaks[512] <= peaks[8] + 0.2 * one, (one, peaks)  # Python frees some a little later
    assert peaks[512] <= 1.8 * one, (one, peaks)  # accumulated gradients beside those of the current micro-batch
    destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize(
    "train", [{}, {"freeze_vision_model": True}, {"freeze_vision_model": True, "freeze_vision_projection": True}]
)
@pytest.mark.parametrize("ranks", [1, 2], ids=["whole", "split"])
def test_the_tower_holds_one_encoder_micro_batch_from_8_to_512_tiles(ranks: int, train: dict[str, Any]) -> None:
    run_ranks(ranks, _check_flat, ranks == 2, train)


# Narrow inside, so that not even megatron-core's projections are wider than the hidden states they come from.
NARROW = dataclasses.replace(
    MODEL, ffn_hidden_size=8, kv_channels=2, vision=dataclasses.replace(VISION, tiles_per_batch=1)
)
# Long, so that a share is more than all parameters together, which are not activations.
LONG_SPECS = (((2201, 1800, 95), tuple(range(3, 3900, 67))), ((3850, 246), tuple(range(0, 3800, 50))))


def _check_shares(layouts: list[dict[str, Any]]) -> None:
    for parallel in layouts:
        stage = stage_of(parallel, model=NARROW)
        packed_seqs = make_packed(LONG_SPECS)
        length = sum(packed_seqs[0].documents)
        share = length // parallel["context_parallel_size"] * NARROW.hidden_size
        large: list[str] = []

        def seen(tensor: torch.Tensor, callers: list[str], share: int = share, large: list[str] = large) -> None:
            if tensor.nbytes > 8 * share:  # in bytes of float64: a buffer of bytes holds tables of several dtypes
                large.append(f"{tuple(tensor.shape)} {tensor.dtype} by {callers[:6]}")

        with Watch(seen):
            one_step(stage, packed_seqs)
        assert not large, f"{parallel}: more than {share} elements: {large[:5]}"
        destroy_groups()


@pytest.mark.slow
def test_no_tensor_exceeds_a_context_ranks_share_of_hidden_states() -> None:
    """With p2p and a2a; `all_gather` holds the keys and values of the whole packed sequence by design."""
    run_ranks(4, _check_shares, [{**SP2, **RING2}, {**RING2, "context_parallel_size": 4}, ULYSSES2])


EXEMPT = ("tensor_parallel/mappings.py", "tensor_parallel/layers.py", "common/embeddings/")
"""megatron-core embeds all tokens of the context rank and scatters them over the tensor ranks."""


def _check_splice() -> None:
    parallel = {**SP2, **CP2}
    groups = build_groups(ParallelConfig(**parallel))
    (model,) = build_model(stage_of(parallel, model=NARROW), groups, dtype=torch.float64)
    model.language_model.requires_grad_(False)  # the backward of the embedding is megatron-core's as well
    for packed_seq in make_packed(LONG_SPECS):
        inputs = inputs_of(packed_seq, groups)
        share = sum(packed_seq.documents) // 4 * NARROW.hidden_size
        large: list[str] = []

        def seen(tensor: torch.Tensor, callers: list[str], share: int = share, large: list[str] = large) -> None:
            if tensor.nbytes > 8 * share and not any(name in one for one in callers[:2] for name in EXEMPT):
                large.append(f"{tuple(tensor.shape)} {tensor.dtype} by {callers[:6]}")

        with Watch(seen):
            embedded = model._embed(inputs["tokens"], model._visual_tokens(inputs["routes"], inputs["tiles"]))
            embedded.sum().backward()
        assert embedded.numel() == share
        assert not large, f"more than {share} elements: {large[:5]}"
    destroy_groups()


@pytest.mark.slow
def test_from_splice_to_decoder_input_no_tensor_exceeds_a_tensor_ranks_share() -> None:
    run_ranks(4, _check_splice)
