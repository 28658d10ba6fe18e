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
from megatron_vita.data.loading.loader import RankCoords
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.build import build_model
from megatron_vita.parallel.groups import build_groups, destroy_groups
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


def _coords(rank: int, tp: int, cp: int, sequence_parallel: bool) -> RankCoords:
    return RankCoords(
        tp_rank=rank % tp, tp_size=tp, cp_rank=rank // tp, cp_size=cp, sequence_parallel=sequence_parallel
    )


ALONE = _coords(0, 1, 1, False)


def _batch(coords: RankCoords, documents: tuple[int, ...], first_token: tuple[int, ...]) -> Batch:
    packed = make_packed([(documents, first_token)])[0]
    layout = SequenceLayout(documents, cp=coords.cp_size, sp=coords.tp_size if coords.sequence_parallel else 1)
    assert MODEL.vision is not None
    first = np.array(first_token, dtype=np.int64)
    routes = TileRoutes(layout, first, MODEL.vision.tokens_per_tile, coords.tp_size)
    mine = torch.from_numpy(layout.local_positions(coords.cp_rank))
    own = routes.tiles_of(coords.group_rank)
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
        coords = _coords(rank, tp, cp, sequence_parallel)
        batch = _batch(coords, *spec)
        tables = prepare_batch(batch, coords, comm_type, CPU).to(CPU)
        assert _equal(tables.schedule, build_schedule(batch.layout, coords.cp_rank, CPU, comm_type))
        assert _equal(tables.exchange, build_exchange(batch.routes, coords.group_rank, CPU))
        assert all(
            torch.equal(getattr(tables, name), getattr(batch, name)) for name in ("tokens", "labels", "positions")
        )
        assert torch.equal(tables.labelled.index, (batch.labels.reshape(-1) >= 0).nonzero().squeeze(1))
        assert tables.labelled.index.dtype == torch.int64


def test_ranks_without_a_tower_exchange_nothing() -> None:
    behind = dataclasses.replace(ALONE, holds_tower=False)
    assert prepare_batch(_batch(behind, *SPECS[0]), behind, "p2p", CPU).tables.exchange is None


def _check_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the `meta` device, whose tensors have no values that a host could read."""
    (model,) = build_model(stage_of({}), build_groups(ParallelConfig()), dtype=torch.bfloat16, fresh=False)
    plain = _batch(ALONE, *SPECS[0])
    batch = dataclasses.replace(plain, prepared=prepare_batch(plain, ALONE, "p2p", CPU))
    inputs = model_inputs(batch, model)
    assert _equal(inputs, model_inputs(plain, model)), "a batch that is not prepared is prepared at once"
    inside = batch.prepared.buffer.untyped_storage().data_ptr()
    assert inputs["labelled"].index.untyped_storage().data_ptr() == inside

    model = model.to(META)
    monkeypatch.setattr(device, "torch_device", lambda: META)
    batch = dataclasses.replace(plain, prepared=prepare_batch(plain, ALONE, "p2p", META))

    def step(**instead: Any) -> tuple[list[str], list[str], list[str]]:
        with Copies() as of_inputs:
            inputs = model_inputs(batch, model)
        with Copies() as of_model:
            model(**{**inputs, **instead}).sum().backward()
        assert all(one.grad is not None for one in model.parameters())
        return of_inputs.to_device, of_model.to_device, of_inputs.reads + of_model.reads

    step()  # rotary frequencies and image means were put on this test's true device
    assert step() == (["_to_copy"] * 2, [], []), "one copy of the tables, one of the tiles, and nothing in the model"
    _, copies, _ = step(schedule=None, exchange=None)
    assert copies == ["_to_copy"] * 2, "without tables the model builds its own"
    with Copies() as copies_of_labels, pytest.raises(NotImplementedError, match="nonzero"):
        model(**{**model_inputs(batch, model), "labelled": None})
    assert copies_of_labels.reads == ["nonzero"]
    destroy_groups()


def test_a_step_makes_no_tensor_from_host_data(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(1, _check_step, monkeypatch)
