"""Tensor-parallel vision towers and encoder micro-batches give the results of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, ParallelConfig
from megatron_vita.models.vision.micro_batches import encode_in_micro_batches, split_tiles
from megatron_vita.parallel.groups import destroy_groups
from tests.checkpoint import tiny
from tests.models.parity import (
    MODEL,
    SPECS,
    VISION,
    compare_step,
    inputs_of,
    make_packed,
    named,
    stage_of,
    write_reference,
)
from tests.models.test_vita_frozen import SPECS as PICTURELESS
from tests.models.test_vita_frozen import STAGE1
from tests.models.test_vita_parallel import CP2, FULL, PP2, SP2, TP2
from tests.ranks import run_ranks


def _model(**tower: Any) -> ModelConfig:
    return dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, **tower))


TOWERS = {
    "InternViT-300M": {},
    "InternViT-6B": {"normalization": "RMSNorm", "add_qkv_bias": False, "qk_layernorm": True},
    "SigLIP": {"model_type": "siglip", "image_norm": "siglip"},
    "CLIP-L": {"model_type": "clip", "norm_epsilon": 1e-5, "num_layers": 3, "image_norm": "clip"},
}


def _check(layouts: list[dict[str, Any]], reference: str, train: dict[str, Any], specs: Any, at_once: int) -> None:
    model = train.get("model", MODEL)
    vision = dataclasses.replace(model.vision, tiles_per_batch=at_once)
    train = {**train, "model": dataclasses.replace(model, vision=vision)}
    for parallel in layouts:
        compare_step(reference, parallel, train, specs)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_whole_or_split_equals_one_process(tmp_path: Path, name: str) -> None:
    reference = write_reference(tmp_path / "reference", {"model": _model(**TOWERS[name])})
    split = {"model": _model(**TOWERS[name], tensor_parallel=True)}
    run_ranks(2, _check, [SP2, CP2, PP2], reference, {"model": _model(**TOWERS[name])}, SPECS, 100)
    run_ranks(
        2, _check, [TP2, SP2, {**SP2, **FULL}, {**SP2, "overlap_grad_reduce": True}], reference, split, SPECS, 100
    )


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("train", [{}, STAGE1, {"freeze_vision_model": True}], ids=["all", "projector", "frozen tower"])
def test_encoder_micro_batches_equal_one_process(tmp_path: Path, train: dict[str, Any], tensor_parallel: bool) -> None:
    """Five and three tiles per packed sequence, two or four per micro-batch: some ranks have an empty micro-batch."""
    reference = write_reference(tmp_path / "reference", train)
    train = {**train, "model": _model(tensor_parallel=tensor_parallel)}
    run_ranks(2, _check, [TP2, SP2, CP2, {**SP2, "overlap_grad_reduce": True}], reference, train, SPECS, 2)


def _check_passes(train: dict[str, Any], tensor_parallel: bool, passes: int) -> None:
    """Tiles that go through the tower in a forward and backward of five tiles, two at a time."""
    from megatron_vita.models.build import build_model
    from megatron_vita.parallel.groups import build_groups

    parallel = SP2 if tensor_parallel else {}
    groups = build_groups(ParallelConfig(**parallel))
    model_config = _model(tensor_parallel=tensor_parallel, tiles_per_batch=2)
    (model,) = build_model(stage_of(parallel, model=model_config, **train), groups, dtype=torch.float64)
    seen: list[int] = []
    model.vision_model.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    (packed_seq, *_) = make_packed()
    model(**inputs_of(packed_seq, groups)).sum().backward()
    assert sum(seen) == passes * 5, seen
    assert max(seen) == 2, seen
    destroy_groups()


@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["whole", "split"])
def test_a_frozen_tower_encodes_every_tile_once_in_a_step(tensor_parallel: bool) -> None:
    """A tower that trains encodes it again in the backward, as with activation recomputation."""
    frozen = {"freeze_vision_model": True}
    for train, passes in ((STAGE1, 1), (frozen, 1), ({**frozen, "freeze_vision_projection": True}, 1), ({}, 2)):
        run_ranks(1 + tensor_parallel, _check_passes, train, tensor_parallel, passes)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), at_once=st.integers(1, 12))
def test_encoder_micro_batches_partition_the_tiles_of_all_ranks(counts: list[int], at_once: int) -> None:
    by_rank = [split_tiles(torch.arange(count), counts, at_once, rank=rank) for rank, count in enumerate(counts)]
    for rank, micro_batches in enumerate(by_rank):
        assert torch.cat([one.tiles for one in micro_batches] or [torch.arange(0)]).tolist() == [*range(counts[rank])]
        assert [one.counts for one in micro_batches] == [one.counts for one in by_rank[0]]
        assert [one.counts[rank] for one in micro_batches] == [len(one.tiles) for one in micro_batches]
    sizes = [sum(one.counts) for one in by_rank[0]]
    assert sizes == [at_once] * (sum(counts) // at_once) + [sum(counts) % at_once] * (sum(counts) % at_once > 0)
    if len(set(counts)) == 1:
        assert all(max(one.counts) - min(one.counts) <= 1 for one in by_rank[0])


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """Each is bfloat16; so would a sum be that forgets the later ones."""
    count = 200
    projector = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
    states = torch.rand(count, 4, 3).bfloat16() + 1
    grad = torch.rand(count, 4, 5).bfloat16() + 1
    micro_batches = split_tiles(torch.arange(count), [count], 1)
    out = encode_in_micro_batches(lambda one: states[one.tiles], projector, micro_batches, (4, 5), [])
    out.backward(grad)
    each = torch.einsum("ntd,nth->ndh", grad, states).float()
    torch.testing.assert_close(projector.weight.grad, each.sum(0).bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", PICTURELESS)
@pytest.mark.parametrize("train", [{}, STAGE1], ids=["all", "projector"])
def test_a_split_tower_does_not_deadlock_without_tiles(tmp_path: Path, case: str, train: dict[str, Any]) -> None:
    reference = write_reference(tmp_path / "reference", train, PICTURELESS[case])
    train = {**train, "model": _model(tensor_parallel=True)}
    run_ranks(2, _check, [TP2, {**SP2, **FULL}, CP2], reference, train, PICTURELESS[case], 1, timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("specs", [SPECS, *PICTURELESS.values()], ids=["tiles", *PICTURELESS])
@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["whole", "split"])
def test_towers_on_four_ranks_equal_one_process(tmp_path: Path, specs: Any, tensor_parallel: bool) -> None:
    """More tiles than ranks, fewer, and none; each encoded once in its tensor x context group."""
    reference = write_reference(tmp_path / "reference", {}, specs)
    train = {"model": _model(tensor_parallel=tensor_parallel)}
    run_ranks(4, _check, [{**TP2, **CP2}, {**SP2, **CP2}, {**SP2, **PP2}], reference, train, specs, 1)


def _reshard(root: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    def trainer(tensor_parallel: bool, parallel: dict[str, Any], seed: int) -> tiny.Trainer:
        tower = dataclasses.replace(tiny.VISION, tensor_parallel=tensor_parallel, **TOWERS["InternViT-6B"])
        return tiny.Trainer(tiny.stage(ParallelConfig(**parallel), model=tiny.smaller(vision=tower), seed=seed))

    one = trainer(**before, seed=1)
    one.step()
    folder = checkpoint.save(root, one.models, one.optimizer, one.scheduler, tiny.state(one.stage, 1), one.groups)
    norm = one.step()
    destroy_groups()
    other = trainer(**after, seed=2)
    checkpoint.load_training(folder, other.models, other.optimizer, other.scheduler)
    assert other.step() == pytest.approx(norm, rel=1e-5)
    shapes = {name for name, _ in named(*other.models)}
    assert "vision_model.decoder.layers.0.self_attention.q_layernorm.weight" in shapes
    destroy_groups()


SPLIT = {"tensor_parallel": True, "parallel": SP2}
WHOLE = {"tensor_parallel": False, "parallel": CP2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [(SPLIT, WHOLE), (WHOLE, SPLIT)], ids=["split to whole", "whole to split"]
)
def test_checkpoints_do_not_know_whether_the_tower_was_split(tmp_path: Path, before: Any, after: Any) -> None:
    run_ranks(2, _reshard, str(tmp_path), before, after)


def _check_once() -> None:
    """Each tile goes through the tower exactly once, to within one of even over context ranks."""
    from megatron_vita.models.build import build_model
    from megatron_vita.parallel.groups import build_groups
    from tests.models.parity import inputs_of, make_packed, stage_of

    for parallel in (SP2, CP2):
        groups = build_groups(ParallelConfig(**parallel))
        (model,) = build_model(stage_of(parallel), groups, dtype=torch.float64)
        seen: list[int] = []
        model.vision_model.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(len(args[0])))
        (packed_seq, *_) = make_packed()
        with torch.no_grad():
            model(**inputs_of(packed_seq, groups))
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
        torch.distributed.all_gather(counts, torch.tensor(sum(seen)))
        assert sorted(int(one) for one in counts) == [2, 3]
        destroy_groups()


def test_every_tile_is_encoded_once() -> None:
    run_ranks(2, _check_once)
