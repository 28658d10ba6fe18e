"""A Batch on the device: every table that the forward pass of one packed sequence needs, copied there at once.

The loader's workers call `prepare_batch`; the training loop then starts one copy of the tables and one of the tiles,
and the host waits for neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import RankCoords
from megatron_vita.parallel.groups import Groups
from megatron_vita.parallel.schedule import Schedule, host_schedule
from megatron_vita.parallel.selection import SelectedTokens, host_selection
from megatron_vita.parallel.tables import HostTables, gather_tables
from megatron_vita.parallel.tiles import FeatureExchange, host_exchange


@dataclass(frozen=True, slots=True)
class BatchTables:
    """Arguments of VitaModel.forward, which describes them, except for `tiles` and what holds no tensors."""

    tokens: Tensor
    labels: Tensor
    labelled: SelectedTokens
    positions: Tensor
    schedule: Schedule
    exchange: FeatureExchange | None
    """None on ranks that hold no tower."""


def coords_of_groups(groups: Groups, *, tower: bool) -> RankCoords:
    """This rank's coordinates; `tower`: the model has one, which the first pipeline stage holds."""
    return RankCoords(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        cp_rank=groups.cp_rank,
        cp_size=groups.cp_size,
        tp_rank=groups.tp_rank,
        tp_size=groups.tp_size,
        sequence_parallel=groups.sequence_parallel,
        holds_tower=groups.first_stage and tower,
    )


def prepare_batch(batch: Batch, coords: RankCoords, comm_type: str, target: torch.device) -> HostTables[BatchTables]:
    """Compute all tables of a batch and lay them out in one page-locked buffer. No communication; any thread.

    Args:
        batch: of this rank.
        coords: of this rank.
        comm_type: parallel.cp_comm_type.
        target: the device that the tables go to (by HostTables.to), whose kernels decide how attention is cut.
    """
    tables = BatchTables(
        tokens=batch.tokens,
        labels=batch.labels,
        labelled=host_selection(
            batch.labelled,
            batch.labels.numel(),
            rank=coords.tp_rank if coords.sequence_parallel else 0,
            ranks=coords.tp_size if coords.sequence_parallel else 1,
        ),
        positions=batch.positions,
        schedule=host_schedule(batch.layout, coords.cp_rank, target, comm_type),
        exchange=host_exchange(batch.routes, coords.group_rank) if coords.holds_tower else None,
    )
    return gather_tables(tables)
