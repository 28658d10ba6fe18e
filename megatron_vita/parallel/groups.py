"""The world, and the process groups of one parallel layout.

Stages of one run may use different layouts in the same processes: `build_groups` makes a layout's groups and
`destroy_groups` takes them all away again; the world stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import device
from megatron_vita.config import ParallelConfig
from megatron_vita.parallel.collectives import reduce_

_alone: dist.ProcessGroup | None = None
"""This rank by itself: the group of everything that is not split, such as the vision tower's matrices."""
_timeout_s = 600.0


def init_distributed(init_method: str | None = None, timeout_s: float = 600) -> None:
    """Join the world: torchrun's, or without its environment a world of this one process. Idempotent.

    Args:
        init_method: torch's rendezvous URL (`file://...`); by default torchrun's environment. A world of one process
            meets in memory and opens no port.
        timeout_s: seconds until a collective that not every rank joins raises.
    """
    global _timeout_s
    device.install()
    if dist.is_initialized():
        return
    _timeout_s = timeout_s
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ["RANK"]) if launched else 0
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    device.bind_rank(int(os.environ.get("LOCAL_RANK", rank)))
    device.prepare_network(single_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size)
    where: dict[str, Any] = {"init_method": init_method or "env://"}
    if init_method is None and world_size == 1:
        where = {"store": dist.HashStore()}  # type: ignore[attr-defined]
    dist.init_process_group(
        device.backend(), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), **where
    )


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place in a layout, and the process groups it shares."""

    collection: Any
    """megatron-core's ProcessGroupCollection of the decoder."""
    tower_collection: Any
    """A ProcessGroupCollection of this rank alone: the tower and the projector are replicated, not split."""
    split_tower_collection: Any
    """A ProcessGroupCollection of the tensor ranks alone, for a tower that is split over them."""
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    sequence_parallel: bool

    @property
    def group_rank(self) -> int:
        """Rank in the tensor x context group, as TileRoutes counts it."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that split the local sequence: TP with sequence parallelism, else 1."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def first_stage(self) -> bool:
        """This rank embeds tokens and holds the tower."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """This rank holds the head and computes the loss."""
        return self.pp_rank == self.pp_size - 1


def build_groups(parallel: ParallelConfig) -> Groups:
    """Make the process groups of one layout; every rank of the world calls it, after `init_distributed`.

    Order of ranks, fastest first: tensor, context, data, pipeline.

    Raises:
        ConfigError: the world does not divide into whole replicas.
    """
    global _alone
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel.data_parallel_size(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=_timeout_s / 60,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    _alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, timeout=timedelta(seconds=_timeout_s))
    names = ("tp", "cp", "pp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp", "mp", "dp", "dp_cp", "expt_dp")
    tower = ProcessGroupCollection(**dict.fromkeys(names, _alone), embd=None, pos_embd=None)
    split_tower = ProcessGroupCollection(
        **{**dict.fromkeys(names, _alone), "tp": collection.tp}, embd=None, pos_embd=None
    )
    return Groups(
        collection=collection,
        tower_collection=tower,
        split_tower_collection=split_tower,
        tp_rank=collection.tp.rank(),
        tp_size=collection.tp.size(),
        cp_rank=collection.cp.rank(),
        cp_size=collection.cp.size(),
        pp_rank=collection.pp.rank(),
        pp_size=collection.pp.size(),
        dp_rank=collection.dp.rank(),
        dp_size=collection.dp.size(),
        sequence_parallel=parallel.sequence_parallel,
    )


def destroy_groups() -> None:
    """Destroy every torch group of the current layout, so that another can be built; every rank calls it.

    megatron-core's own destroy_model_parallel only forgets them: after five layouts 89 were still alive.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        # A rank that is still inside a collective of a group must not find its peer gone.
        dist.barrier()
        groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
        for group in groups + ([_alone] if _alone is not None else []):
            if dist.distributed_c10d._world.pg_map.get(group) is not None:
                dist.destroy_process_group(group)
    forget_groups()


def forget_groups() -> None:
    """What a rank does instead that failed, perhaps alone: waiting for the others, who wait for it, would hang all.

    The torch groups live until the process ends, which breaks the others' collectives.
    """
    global _alone
    from megatron.core import parallel_state

    _alone = None
    parallel_state.destroy_model_parallel()


def tensor_parallel_sum_(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in place, in one collective."""
    if not tensors or group.size() == 1:
        return
    flat = torch.cat([one.reshape(-1) for one in tensors])
    reduce_(flat, group)
    for one, summed in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        one.copy_(summed.view_as(one))
