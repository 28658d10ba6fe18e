"""torch.distributed initialisation, and the process groups of one parallel layout.

Training stages may use different layouts in the same processes: `build_groups` creates the groups of a layout,
`destroy_groups` destroys them; the default (world) group stays.
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

_single_rank: dist.ProcessGroup | None = None
"""Group of this rank alone, for modules that are not split, such as a replicated vision tower."""
_timeout_s = 600.0


def init_distributed(init_method: str | None = None, timeout_s: float = 600) -> None:
    """Initialise torch.distributed from torchrun's environment, or with world size 1 without it. Idempotent.

    Args:
        init_method: torch's rendezvous URL (`file://...`); by default torchrun's environment. A world of one process
            uses an in-memory store and opens no port.
        timeout_s: seconds after which a collective that not every rank joined raises.
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
    """Coordinates of this rank in a parallel layout, and its process groups."""

    collection: Any
    """megatron-core's ProcessGroupCollection of the decoder."""
    tower_collection: Any
    """ProcessGroupCollection whose groups all are this rank alone, for a vision tower replicated on every rank."""
    split_tower_collection: Any
    """The same with the decoder's tensor-parallel group as `tp`, for a tensor-parallel vision tower."""
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
        """Rank in the tensor x context group, cp_rank * tp_size + tp_rank, as used by TileRoutes."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that split the local sequence: TP with sequence parallelism, else 1."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def first_stage(self) -> bool:
        """True on the first pipeline rank: it holds vision tower, projector and embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """True on the last pipeline rank: it holds the output layer and computes the loss."""
        return self.pp_rank == self.pp_size - 1


def build_groups(parallel: ParallelConfig) -> Groups:
    """Create the process groups of one layout; collective over the world, after `init_distributed`.

    Order of ranks, fastest varying first: tensor, context, data, pipeline.

    Raises:
        ConfigError: the world size is not a multiple of tensor x context x pipeline.
    """
    global _single_rank
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
    _single_rank = dist.new_group(
        [dist.get_rank()], use_local_synchronization=True, timeout=timedelta(seconds=_timeout_s)
    )
    names = ("tp", "cp", "pp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp", "mp", "dp", "dp_cp", "expt_dp")
    tower = ProcessGroupCollection(**dict.fromkeys(names, _single_rank), embd=None, pos_embd=None)
    split_tower = ProcessGroupCollection(
        **{**dict.fromkeys(names, _single_rank), "tp": collection.tp}, embd=None, pos_embd=None
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
    """Destroy all torch process groups of the current layout; collective over the world.

    megatron-core's destroy_model_parallel only drops its references: after five layouts 89 groups were still alive.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        # No rank may destroy a group while another rank is still inside one of its collectives.
        dist.barrier()
        groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
        for group in groups + ([_single_rank] if _single_rank is not None else []):
            if dist.distributed_c10d._world.pg_map.get(group) is not None:
                dist.destroy_process_group(group)
    forget_groups()


def forget_groups() -> None:
    """Drop the references to the groups without communication, on a rank that failed: `destroy_groups` would deadlock.

    The torch process groups live until the process exits, which makes pending collectives of the other ranks fail.
    """
    global _single_rank
    from megatron.core import parallel_state

    _single_rank = None
    parallel_state.destroy_model_parallel()


def tensor_parallel_sum_(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce (sum) tensors of one dtype in place, flattened into one collective. All ranks of `group` call it."""
    if not tensors or group.size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    reduce_(flat, group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
