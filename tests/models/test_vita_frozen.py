"""Frozen parts and ranks without pictures: no deadlock, in the forward or the backward, on a rank without work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita.config.parallel import CP_COMM_TYPES
from megatron_vita.parallel.groups import destroy_groups
from tests.models import parity
from tests.models.parity import compare_step, make_packed, one_step, stage_of, write_reference
from tests.models.test_vita_parallel import CORE, CP2, FULL, PP2, SP2, TP2
from tests.ranks import run_ranks

STAGE1 = {"freeze_vision_model": True, "freeze_language_model": True}
# Tiles in the first tokens only: with cp 2 their encoder is one rank, and both own some of the document.
SPECS: dict[str, Any] = {
    "one rank has no tile": (((20, 27, 1), (2,)), ((20, 27, 1), (6,))),
    "one packed sequence has no tile": (((20, 27, 1), (2, 30)), ((20, 27, 1), ())),
    "no tile at all": (((20, 27, 1), ()), ((20, 27, 1), ())),
}


def _check(layouts: list[dict[str, Any]], reference: str, train: dict[str, Any], specs: Any) -> None:
    for parallel in layouts:
        compare_step(reference, parallel, train, specs)


@pytest.mark.slow
@pytest.mark.parametrize("case", SPECS)
def test_projector_alone_trains_in_every_layout(tmp_path: Path, case: str) -> None:
    reference = write_reference(tmp_path / "reference", STAGE1, SPECS[case])
    layouts = [SP2, {**TP2, **FULL}, PP2, {"overlap_grad_reduce": True}]
    run_ranks(2, _check, layouts, reference, STAGE1, SPECS[case], timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("cp_comm_type", CP_COMM_TYPES)
@pytest.mark.parametrize("case", SPECS)
def test_projector_alone_trains_under_every_exchange(tmp_path: Path, case: str, cp_comm_type: str) -> None:
    reference = write_reference(tmp_path / "reference", STAGE1, SPECS[case])
    cp2 = {**CP2, "cp_comm_type": cp_comm_type}
    layouts = [cp2, {**cp2, **FULL}, {**cp2, **CORE}, {**cp2, "overlap_grad_reduce": True}]
    run_ranks(2, _check, layouts, reference, STAGE1, SPECS[case], timeout_s=60)


@pytest.mark.parametrize("case", ["one rank has no tile", "no tile at all"])
def test_all_train_though_a_rank_has_no_tile(tmp_path: Path, case: str) -> None:
    reference = write_reference(tmp_path / "reference", {}, SPECS[case])
    layouts = [CP2, {**SP2, **FULL}, {**CP2, "overlap_grad_reduce": True}]
    run_ranks(2, _check, layouts, reference, {}, SPECS[case], timeout_s=60)


def test_frozen_tower_trains_the_rest(tmp_path: Path) -> None:
    train = {"freeze_vision_model": True}
    reference = write_reference(tmp_path / "reference", train)
    run_ranks(2, _check, [CP2, PP2], reference, train, parity.SPECS, timeout_s=60)


def _check_no_labels() -> None:
    packed_seqs = make_packed(SPECS["one rank has no tile"])
    for packed_seq in packed_seqs:
        packed_seq.labels.fill_(-100)
    (model,), _, loss = one_step(stage_of(CP2), packed_seqs)
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert torch.count_nonzero(parameter.main_grad) == 0, name
    destroy_groups()


def test_a_step_without_labels_gives_zero_gradients() -> None:
    run_ranks(2, _check_no_labels, timeout_s=60)
