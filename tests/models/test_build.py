"""build_model: parameter names in checkpoints, initial weights, parameter attributes, errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError
from megatron_vita.kernels import choose_implementation
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.build import build_model
from megatron_vita.models.norms import RMSNorm
from megatron_vita.models.projector import pixel_shuffle
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.models.parity import MODEL, VISION, inputs_of, make_packed, named, one_step, stage_of
from tests.models.test_vita_parallel import CP2, PP2, SP2, TP2
from tests.models.watch import Watch
from tests.ranks import run_ranks

H, F, V = MODEL.hidden_size, MODEL.ffn_hidden_size, MODEL.vocab_size
QKV = (MODEL.num_attention_heads + 2 * MODEL.num_query_groups) * MODEL.head_dim
TOWER_H, TOWER_F, PATCH = VISION.hidden_size, VISION.ffn_hidden_size, VISION.patch_size
DECODER_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (H,),
    "self_attention.linear_qkv.weight": (QKV, H),
    "self_attention.linear_qkv.bias": (QKV,),
    "self_attention.linear_proj.weight": (H, MODEL.num_attention_heads * MODEL.head_dim),
    "mlp.linear_fc1.layer_norm_weight": (H,),
    "mlp.linear_fc1.weight": (2 * F, H),
    "mlp.linear_fc2.weight": (H, F),
}
TOWER_LAYER = {
    "ls1": (TOWER_H,),
    "ls2": (TOWER_H,),
    "self_attention.linear_qkv.layer_norm_weight": (TOWER_H,),
    "self_attention.linear_qkv.layer_norm_bias": (TOWER_H,),
    "self_attention.linear_qkv.weight": (3 * TOWER_H, TOWER_H),
    "self_attention.linear_qkv.bias": (3 * TOWER_H,),
    "self_attention.linear_proj.weight": (TOWER_H, TOWER_H),
    "self_attention.linear_proj.bias": (TOWER_H,),
    "mlp.linear_fc1.layer_norm_weight": (TOWER_H,),
    "mlp.linear_fc1.layer_norm_bias": (TOWER_H,),
    "mlp.linear_fc1.weight": (TOWER_F, TOWER_H),
    "mlp.linear_fc1.bias": (TOWER_F,),
    "mlp.linear_fc2.weight": (TOWER_H, TOWER_F),
    "mlp.linear_fc2.bias": (TOWER_H,),
}
KEYS = {
    "language_model.embedding.word_embeddings.weight": (V, H),
    "language_model.decoder.final_layernorm.weight": (H,),
    "language_model.output_layer.weight": (V, H),
    "vision_model.class_token": (1, 1, TOWER_H),
    "vision_model.position_embeddings.weight": (VISION.num_patches + 1, TOWER_H),
    "vision_model.conv1.weight": (TOWER_H, 3, PATCH, PATCH),
    "vision_model.conv1.bias": (TOWER_H,),
    "vision_projection.pre_proj_layernorm.weight": (4 * TOWER_H,),
    "vision_projection.pre_proj_layernorm.bias": (4 * TOWER_H,),
    "vision_projection.encoder.linear_fc1.weight": (H, 4 * TOWER_H),
    "vision_projection.encoder.linear_fc1.bias": (H,),
    "vision_projection.encoder.linear_fc2.weight": (H, H),
    "vision_projection.encoder.linear_fc2.bias": (H,),
    **{f"language_model.decoder.layers.{n}.{k}": v for n in range(MODEL.num_layers) for k, v in DECODER_LAYER.items()},
    **{f"vision_model.decoder.layers.{n}.{k}": v for n in range(VISION.num_layers) for k, v in TOWER_LAYER.items()},
}
"""The contract: every key of a checkpoint, with its whole shape (the vocabulary may be padded)."""


def _check_keys(layouts: list[dict[str, Any]]) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
    from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

    for parallel in layouts:
        groups = build_groups(ParallelConfig(**parallel))
        (model,) = build_model(stage_of(parallel), groups)
        state = model.sharded_state_dict()
        assert set(state) == {name for name, _ in model.named_parameters()}, "what load_state_dict takes"
        assert any(isinstance(one, ShardedTensorFactory) for one in state.values())
        apply_factories(state)
        flat = [piece for one in state.values() for piece in (one if isinstance(one, list) else [one])]
        _, everyone = determine_global_metadata(flat)
        validate_sharding_integrity(everyone)  # every element saved by exactly one rank
        shapes = {piece.key: tuple(piece.global_shape) for pieces in everyone for piece in pieces}
        padded = MODEL.padded_vocab_size(groups.tp_size)
        want = {key: (padded, H) if shape == (V, H) else shape for key, shape in KEYS.items()}
        assert shapes == want, parallel
        destroy_groups()


def test_checkpoint_keys_are_the_contract_in_every_layout() -> None:
    run_ranks(2, _check_keys, [{}, TP2, SP2, PP2, CP2])


def _check_marks() -> None:
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    groups = build_groups(ParallelConfig(**SP2))
    (model,) = build_model(stage_of(SP2), groups)
    counted = torch.zeros(())
    for name, parameter in named(model):
        split = math.prod(parameter.shape) < math.prod(KEYS[name])
        once = param_is_not_tensor_parallel_duplicate(parameter)
        assert once == (split or groups.tp_rank == 0), name
        counted += parameter.numel() * once
        assert getattr(parameter, "partial_over_tp", False) == name.startswith("vision_"), name
        norm = name.startswith("language_model") and "norm" in name
        assert bool(getattr(parameter, "sequence_parallel", False)) == norm, name
    dist.all_reduce(counted, group=groups.collection.tp)
    padding = 2 * (MODEL.padded_vocab_size(2) - V) * H
    assert int(counted) == sum(math.prod(shape) for shape in KEYS.values()) + padding
    destroy_groups()


def test_norms_and_clipping_count_every_weight_once() -> None:
    run_ranks(2, _check_marks)


def _check_fresh() -> None:
    groups = build_groups(ParallelConfig())
    (one,) = build_model(stage_of({}, seed=1), groups)
    (two,) = build_model(stage_of({}, seed=2), groups)
    for (name, first), (_, second) in zip(named(one), named(two), strict=True):
        drawn = first.dim() > 1
        assert torch.equal(first, second) != drawn, name
        if drawn:
            std = MODEL.init_method_std if not name.startswith("vision_model") else VISION.init_method_std
            if name.startswith("language_model") and name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * MODEL.num_layers)
            assert abs(float(first.std()) / std - 1) < 0.25, name
        elif "ls" in name.rsplit(".", 1)[-1]:
            assert bool((first == VISION.layer_scale_init).all()), name
    destroy_groups()


def test_fresh_weights_follow_the_seed_and_the_settings() -> None:
    run_ranks(1, _check_fresh)


def _check_chunks() -> None:
    (packed_seq, *_) = make_packed()
    features, grads = [], []
    for at_once in (None, 2):  # all five tiles at once, then two at a time
        groups = build_groups(ParallelConfig())
        vision = dataclasses.replace(VISION, tiles_per_batch=at_once)
        stage = stage_of({}, model=dataclasses.replace(MODEL, vision=vision))
        (model,) = build_model(stage, groups, dtype=torch.float64)
        inputs = inputs_of(packed_seq, groups)
        features.append(model.encode(inputs["tiles"]))
        model(**inputs).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        destroy_groups()
    torch.testing.assert_close(*features)
    torch.testing.assert_close(*grads)


def test_encoder_micro_batches_change_nothing() -> None:
    run_ranks(1, _check_chunks)


def _check_bfloat16(layouts: list[dict[str, Any]]) -> None:
    packed_seqs = make_packed()
    _, _, exact = one_step(stage_of({}), packed_seqs)
    destroy_groups()
    for parallel in layouts:
        models, groups, loss = one_step(stage_of(parallel), packed_seqs, dtype=torch.bfloat16)
        if groups.last_stage:
            assert abs(loss - exact) < 0.03 * exact, (parallel, loss, exact)
        for name, parameter in named(*models):
            assert parameter.dtype == torch.bfloat16, name
            assert bool(torch.isfinite(parameter.main_grad).all()), name
        destroy_groups()


@pytest.mark.slow
def test_bfloat16_stays_near() -> None:
    run_ranks(2, _check_bfloat16, [{}, SP2, PP2, CP2])


def _check_uninitialised() -> None:
    groups = build_groups(ParallelConfig(**SP2))
    vision = dataclasses.replace(VISION, tensor_parallel=True)
    made: list[torch.Size] = []
    with Watch(lambda new, _: made.append(new.shape) if new.is_floating_point() else None):
        (model,) = build_model(stage_of(SP2, model=dataclasses.replace(MODEL, vision=vision)), groups, fresh=False)
    largest = max(made, key=lambda shape: shape.numel())
    assert largest.numel() == max(parameter.numel() for parameter in model.parameters()), largest
    destroy_groups()


def test_a_model_that_will_be_loaded_allocates_its_shards_only() -> None:
    run_ranks(2, _check_uninitialised)


def test_pixel_shuffle_follows_the_formula() -> None:
    side, channels = 6, 3
    x = torch.arange(2 * side * side * channels).view(2, side, side, channels)
    got = pixel_shuffle(x.flatten(1, 2)).view(2, 3, 3, 4 * channels)
    for a in range(3):
        for b in range(3):
            for m in range(4 * channels):
                row, col = 2 * a + m // (2 * channels), 2 * b + m % (2 * channels) // channels
                assert torch.equal(got[:, a, b, m], x[:, row, col, m % channels])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    from types import SimpleNamespace

    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 12, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(2, 5, 3, 12, dtype=dtype)
    mine, reference = (x.clone().requires_grad_() for _ in range(2))
    got = norm(mine)
    got.backward(grad)
    d_weight, norm.weight.grad = norm.weight.grad, None
    want = torch.nn.functional.rms_norm(reference, (12,), norm.weight, 1e-5)
    want.backward(grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine.grad, reference.grad)
    torch.testing.assert_close(d_weight, norm.weight.grad)


def test_swiglu_equals_autograd() -> None:
    x, grad = torch.randn(6, 3, 10, dtype=torch.float64), torch.randn(6, 3, 5, dtype=torch.float64)
    mine, reference = (x.clone().requires_grad_() for _ in range(2))
    got = SwiGLU(None)(mine)
    got.backward(grad)
    gate, up = reference.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    want.backward(grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine.grad, reference.grad)


def test_transformer_engine_is_refused_where_it_is_not() -> None:
    assert choose_implementation("local") == "local"
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        assert choose_implementation("auto") == "local"
        with pytest.raises(ConfigError, match="`cuda` extra"):
            choose_implementation("te")


def _check_constants() -> None:
    """megatron-core's Float16Module turns every buffer into bfloat16: positions beyond 256 would fall together."""
    from megatron.core.transformer.module import Float16Module

    groups = build_groups(ParallelConfig())
    (model,) = build_model(stage_of({}), groups, dtype=torch.bfloat16)
    far = torch.tensor([[0, 1, 1000, 131_071]])
    before = model.rotary(far, torch.float32)
    pixels = torch.full((1, 3, VISION.image_size, VISION.image_size), 120, dtype=torch.uint8)
    normalised = model.vision_model.normalise(pixels)
    Float16Module(model.config, model)
    torch.testing.assert_close(model.rotary(far, torch.float32), before, rtol=0, atol=0)
    torch.testing.assert_close(model.vision_model.normalise(pixels), normalised, rtol=0, atol=0)
    destroy_groups()


def test_bfloat16_leaves_rotary_frequencies_and_pixel_means_alone() -> None:
    run_ranks(1, _check_constants)
