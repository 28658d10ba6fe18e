"""A prepared batch is what the model would build itself, and with it a step asks the host for nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vita import device
from megatron_vita.config import ParallelConfig
from megatron_vita.data.loading.batch import Batch
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups
from megatron_vita.parallel.schedule import build_schedule
from megatron_vita.parallel.tables import map_tensors
from megatron_vita.parallel.tiles import build_exchange
from megatron_vita.training.device_batch import prepare_batch
from megatron_vita.training.step import model_inputs
from tests.host_data import Copies
from tests.models.parity import MODEL, SPECS, make_packed, stage_of
from tests.ranks import run_ranks

CPU, META = torch.device("cpu"), torch.device("meta")
SPLITS = [  # tp, cp, sequence parallel, cp_comm_type
    (1, 1, False, "p2p"),
    (2, 1, True, "all_gather"),
    (1, 2, False, "p2p"),
    (2, 2, True, "all_gather"),
    (2, 4, False, "a2a"),
]


def _groups(rank: int, tp: int, cp: int, sequence_parallel: bool) -> Groups:
    return Groups(
        collection=None, tower_collection=None, split_tower_collection=None, tp_rank=rank % tp, tp_size=tp,
        cp_rank=rank // tp, cp_size=cp, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1, sequence_parallel=sequence_parallel,
    )  # fmt: skip


def _batch(groups: Groups, documents: tuple[int, ...], first_token: tuple[int, ...]) -> Batch:
    packed = make_packed([(documents, first_token)])[0]
    layout = SequenceLayout(documents, cp=groups.cp_size, sp=groups.sequence_shards)
    routes = TileRoutes(layout, np.array(first_token, dtype=np.int64), MODEL.vision.tokens_per_tile, groups.tp_size)
    mine = torch.from_numpy(layout.local_positions(groups.cp_rank))
    own = routes.tiles_of(groups.group_rank)
    return Batch(
        tokens=packed.tokens[mine][None],
        labels=packed.labels[mine][None],
        positions=torch.from_numpy(layout.positions_in_document)[mine][None],
        layout=layout,
        tiles=packed.tiles[own.start : own.stop],
        tile_ids=torch.arange(own.start, own.stop),
        routes=routes,
        sample_ids=(),
    )


def _equal(one: Any, other: Any) -> bool:
    """Equal tensors, and equal objects around them."""
    tensors: list[list[torch.Tensor]] = [[], []]
    rest = [
        map_tensors(side, lambda x, kept=kept: kept.append(x)) for side, kept in zip((one, other), tensors, strict=True)
    ]
    return str(rest[0]) == str(rest[1]) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )


@pytest.mark.parametrize(("tp", "cp", "sequence_parallel", "comm_type"), SPLITS)
@pytest.mark.parametrize("spec", SPECS)
def test_prepared_tables_are_those_of_the_layout(
    spec: Any, tp: int, cp: int, sequence_parallel: bool, comm_type: str
) -> None:
    for rank in range(tp * cp):
        groups = _groups(rank, tp, cp, sequence_parallel)
        batch = _batch(groups, *spec)
        tables = prepare_batch(batch, groups, comm_type, CPU).to(CPU)
        assert _equal(tables.schedule, build_schedule(batch.layout, groups.cp_rank, CPU, comm_type))
        assert _equal(tables.exchange, build_exchange(batch.routes, groups.group_rank, CPU))
        assert all(
            torch.equal(getattr(tables, name), getattr(batch, name)) for name in ("tokens", "labels", "positions")
        )
        assert torch.equal(tables.labelled, (batch.labels.reshape(-1) >= 0).nonzero().squeeze(1))
        assert tables.labelled.dtype == torch.int64


def test_ranks_behind_the_first_stage_exchange_nothing() -> None:
    groups = dataclasses.replace(_groups(0, 1, 1, False), pp_rank=1, pp_size=2)
    assert prepare_batch(_batch(groups, *SPECS[0]), groups, "p2p", CPU).tables.exchange is None


def test_inputs_come_from_the_prepared_tables_if_there_are_any() -> None:
    groups = _groups(0, 1, 1, False)
    plain = _batch(groups, *SPECS[0])
    prepared = dataclasses.replace(plain, prepared=prepare_batch(plain, groups, "p2p", CPU))
    inputs = [model_inputs(one, groups, "p2p") for one in (plain, prepared)]
    assert _equal(*inputs)
    inside = prepared.prepared.buffer.untyped_storage().data_ptr()
    assert inputs[1]["labelled"].untyped_storage().data_ptr() == inside


def _check_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the `meta` device, whose tensors have no values that a host could read."""
    groups = build_groups(ParallelConfig())
    (model,) = build_model(stage_of({}), groups, dtype=torch.bfloat16, fresh=False)
    model = model.to(META)
    monkeypatch.setattr(device, "torch_device", lambda: META)
    batch = _batch(groups, *SPECS[0])
    batch = dataclasses.replace(batch, prepared=prepare_batch(batch, groups, "p2p", META))

    def step(**instead: Any) -> tuple[list[str], list[str], list[str]]:
        with Copies() as of_inputs:
            inputs = model_inputs(batch, groups, "p2p")
        with Copies() as of_model:
            model(**{**inputs, **instead}).sum().backward()
        assert all(one.grad is not None for one in model.parameters())
        return of_inputs.to_device, of_model.to_device, of_inputs.reads + of_model.reads

    step()  # rotary frequencies and image means were put on this test's true device
    assert step() == (["_to_copy"] * 2, [], []), "one copy of the tables, one of the tiles, and nothing in the model"
    _, copies, _ = step(schedule=None, exchange=None)
    assert copies == ["_to_copy"] * 2, "without tables the model builds its own"
    with Copies() as copies_of_labels, pytest.raises(NotImplementedError, match="nonzero"):
        model(**{**model_inputs(batch, groups, "p2p"), "labelled": None})
    assert copies_of_labels.reads == ["nonzero"]
    destroy_groups()


def test_a_step_makes_no_tensor_from_host_data(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(1, _check_step, monkeypatch)
