"""Uneven and interleaved pipelines give the loss, the gradients and the checkpoints of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.config import ModelConfig, ParallelConfig
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
from tests.checkpoint import tiny
from tests.models.parity import MODEL, SPECS, compare_step, make_packed, named, one_step, stage_of, write_reference
from tests.models.test_vita_frozen import SPECS as PICTURELESS
from tests.models.test_vita_frozen import STAGE1
from tests.models.test_vita_parallel import CORE, CP2, FULL, PP2, SP2, TP2
from tests.ranks import run_ranks

SIX_LAYERS = dataclasses.replace(MODEL, num_layers=6)
TIED = dataclasses.replace(SIX_LAYERS, untie_embeddings_and_output_weights=False)
VPP2 = {**PP2, "pipeline_model_parallel_layout": "Et|tt|tt|tL"}
VPP3 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
UNEVEN = {**PP2, "decoder_first_pipeline_num_layers": 1}
BARE_ENDS = {**PP2, "pipeline_model_parallel_layout": "E|ttt|ttt|L"}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
OVERLAP = {"overlap_grad_reduce": True}


def _check(layouts: list[dict[str, Any]], reference: str, train: dict[str, Any], specs: Any) -> None:
    for parallel in layouts:
        compare_step(reference, parallel, train, specs)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SIX_LAYERS, TIED], ids=["untied", "tied"])
def test_pipelines_on_two_ranks_equal_one_process(tmp_path: Path, model: ModelConfig) -> None:
    train = {"model": model}
    reference = write_reference(tmp_path / "reference", train)
    layouts = [VPP2, VPP3, UNEVEN, BARE_ENDS]
    if model is SIX_LAYERS:
        layouts += [{**VPP3, **FULL}, {**VPP2, **BLOCK}, {**VPP3, **CORE}, {**VPP2, **OVERLAP}, {**UNEVEN, **BLOCK}]
    run_ranks(2, _check, layouts, reference, train, SPECS)


@pytest.mark.slow
def test_pipelines_on_four_ranks_equal_one_process(tmp_path: Path) -> None:
    train = {"model": SIX_LAYERS}
    specs = SPECS * 2  # two for each of two data ranks
    reference = write_reference(tmp_path / "reference", train, specs)
    four = {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|tt|ttt|tL"}
    layouts = [{**VPP2, **TP2}, {**VPP3, **SP2, **FULL}, {**VPP2, **CP2}, {**VPP3, **OVERLAP}, four, {**UNEVEN, **CP2}]
    run_ranks(4, _check, layouts, reference, train, specs)


@pytest.mark.slow
@pytest.mark.parametrize("case", PICTURELESS)
def test_frozen_stages_do_not_deadlock(tmp_path: Path, case: str) -> None:
    """Only the projector trains: some stages have no trainable parameter, some packed sequences no picture."""
    train = {**STAGE1, "model": SIX_LAYERS}
    reference = write_reference(tmp_path / "reference", train, PICTURELESS[case])
    layouts = [PP2, VPP2, {**VPP3, **FULL}, {**VPP2, **OVERLAP}]
    run_ranks(2, _check, layouts, reference, train, PICTURELESS[case], timeout_s=60)


def test_a_tied_and_frozen_decoder_works_over_stages(tmp_path: Path) -> None:
    train = {**STAGE1, "model": TIED}
    reference = write_reference(tmp_path / "reference", train)
    run_ranks(2, _check, [PP2, VPP2], reference, train, SPECS, timeout_s=60)


def _check_bfloat16() -> None:
    packed_seqs = make_packed()
    _, _, exact = one_step(stage_of({}, model=SIX_LAYERS), packed_seqs)
    destroy_groups()
    models, groups, loss = one_step(stage_of(VPP2, model=SIX_LAYERS), packed_seqs, dtype=torch.bfloat16)
    assert [model.vp_stage for model in models] == [0, 1]
    if groups.last_stage:
        assert abs(loss - exact) < 0.03 * exact
    for name, parameter in named(*models):
        assert bool(torch.isfinite(parameter.main_grad).all()), name
    destroy_groups()


def test_bfloat16_stays_near() -> None:
    run_ranks(2, _check_bfloat16)


def _check_no_wait() -> None:
    def waits() -> None:
        raise AssertionError("the host waits for the GPU")

    with mock.patch.object(torch.cuda, "synchronize", waits):
        for parallel in (PP2, VPP2):
            one_step(stage_of(parallel, model=SIX_LAYERS), make_packed())
            destroy_groups()


def test_stages_exchange_hidden_states_without_a_wait_of_the_host() -> None:
    run_ranks(2, _check_no_wait)


def _settings(parallel: dict[str, Any], seed: int) -> Any:
    return tiny.stage(ParallelConfig(**parallel), model=tiny.smaller(num_layers=6), seed=seed)


def _save_and_load(root: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Train two steps in a layout, save, load in another, take a third step in both."""
    trainer = tiny.Trainer(_settings(one, 1))
    for _ in range(2):
        trainer.step()
    keys = sorted(name for name, _ in named(*trainer.models))
    saved = checkpoint.save(
        root, trainer.models, trainer.optimizer, trainer.scheduler, tiny.state(trainer.stage, 2), trainer.groups
    )
    norm = trainer.step()
    whole = _gathered(trainer.models)
    destroy_groups()
    trainer = tiny.Trainer(_settings(other, 2))
    assert keys != sorted(name for name, _ in named(*trainer.models)), "the layouts partition the layers differently"
    checkpoint.load_training(saved, trainer.models, trainer.optimizer, trainer.scheduler)
    assert trainer.step() == pytest.approx(norm, rel=1e-5)
    loaded = _gathered(trainer.models)
    assert loaded.keys() == whole.keys()
    for name, want in whole.items():
        torch.testing.assert_close(
            loaded[name], want, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )
    destroy_groups()


def _gathered(models: list[Any]) -> dict[str, torch.Tensor]:
    """All parameters of the pipeline, by their names in checkpoints."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, {name: p.detach().clone() for name, p in named(*models)})
    return {name: one for part in everyone for name, one in part.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [(VPP2, {}), ({}, VPP3), (VPP3, UNEVEN)], ids=["to one", "from one", "both"])
def test_checkpoints_go_from_any_pipeline_to_any_other(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    run_ranks(2, _save_and_load, str(tmp_path), one, other)


def _check_fresh_flag() -> None:
    groups = build_groups(stage_of({}).parallel)
    (initialised,) = build_model(stage_of({}), groups)
    (uninitialised,) = build_model(stage_of({}), groups, fresh=False)
    assert {name for name, _ in initialised.named_parameters()} == {
        name for name, _ in uninitialised.named_parameters()
    }
    assert not torch.equal(initialised.vision_model.conv1.weight, uninitialised.vision_model.conv1.weight)
    destroy_groups()


def test_weights_that_are_loaded_anyway_are_not_drawn() -> None:
    run_ranks(1, _check_fresh_flag)
