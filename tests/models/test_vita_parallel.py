"""Every layout gives the loss and the gradients of one process (float64, forward and backward)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import ProjectorConfig
from tests.models.parity import GLM, MODEL, SPECS, VISION, compare_step, write_reference
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
GATHER2 = {**CP2, "cp_comm_type": "all_gather"}
RING2 = {**CP2, "cp_comm_type": "p2p"}
ULYSSES2 = {**CP2, "cp_comm_type": "a2a"}
CORE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _check_layouts(
    layouts: list[dict[str, Any]], reference: str, train: dict[str, Any], specs: Any, reset: bool
) -> None:
    for parallel in layouts:
        compare_step(reference, parallel, train, specs, reset)


@pytest.mark.slow
@pytest.mark.parametrize("reset", [True, False], ids=["documents", "one document"])
def test_two_ranks_equal_one_process(tmp_path: Path, reset: bool) -> None:
    reference = write_reference(tmp_path / "reference", {}, reset=reset)
    layouts = [{}, {"overlap_grad_reduce": True}, TP2, SP2, PP2, CP2, {**SP2, **FULL}, {**CP2, **FULL}, {**CP2, **CORE}]
    layouts += [GATHER2, ULYSSES2, {**GATHER2, **FULL}, {**ULYSSES2, **CORE}]
    run_ranks(2, _check_layouts, layouts, reference, {}, SPECS, reset)


TEXT_ROWS = tuple((documents, ()) for documents, _ in SPECS)
VARIANTS = {
    "tied embeddings": (dataclasses.replace(MODEL, untie_embeddings_and_output_weights=False), SPECS),
    "text only": (dataclasses.replace(MODEL, vision=None), TEXT_ROWS),
    "Long-VITA's projector": (
        dataclasses.replace(MODEL, projector=ProjectorConfig(ffn_hidden_size=16, bias=False), add_qkv_bias=False),
        SPECS,
    ),
    "Qwen3 with a tower that norms its queries too": (
        dataclasses.replace(
            MODEL,
            add_qkv_bias=False,
            qk_layernorm=True,
            kv_channels=10,
            vision=dataclasses.replace(VISION, add_qkv_bias=False, qk_layernorm=True, normalization="RMSNorm"),
        ),
        SPECS,
    ),
    "Llama 3.1": (dataclasses.replace(MODEL, add_qkv_bias=False, rope_scaling_factor=8.0, rotary_base=5e5), SPECS),
    "GLM-4": (GLM, SPECS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_equal_one_process(tmp_path: Path, name: str) -> None:
    model, specs = VARIANTS[name]
    train = {"model": model}
    reference = write_reference(tmp_path / "reference", train, specs)
    run_ranks(2, _check_layouts, [TP2, SP2, PP2, CP2], reference, train, specs, True)


@pytest.mark.slow
def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    reference = write_reference(tmp_path / "reference", {})
    layouts = [{**TP2, **CP2}, {**SP2, **CP2}, {**PP2, **CP2}, {**PP2, **SP2, **FULL}, {"context_parallel_size": 4}]
    layouts += [{**SP2, **GATHER2}, {**PP2, **ULYSSES2}, {**GATHER2, "context_parallel_size": 4}]
    run_ranks(4, _check_layouts, layouts, reference, {}, SPECS, True)
