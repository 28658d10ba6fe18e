"""The ranks of an engine: their layout, who leads, and the few things that they tell each other between steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita.config import ParallelConfig
from megatron_vita.device import is_lost_rank, torch_device
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.parallel.collectives import broadcast_, reduce_
from megatron_vita.parallel.groups import Groups, build_groups, destroy_groups, init_distributed

_built: tuple[ParallelConfig, Groups] | None = None


def inference_groups(parallel: ParallelConfig) -> Groups:
    """The process groups of a layout; engines of one layout share them, those of another lose theirs. Collective over
    the world.

    Raises:
        ConfigError: the launched ranks are not tensor x context x pipeline.
    """
    global _built
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != parallel.replica_size:
        raise ConfigError(
            f"{launched} rank(s) were launched for tensor {parallel.tensor_model_parallel_size} x context "
            f"{parallel.context_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} = "
            f"{parallel.replica_size}. Start with `torchrun --nproc-per-node {parallel.replica_size}` (one rank needs "
            "no torchrun), or change the sizes."
        )
    init_distributed()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        alive = _built is not None and parallel_state.get_tensor_model_parallel_group() is _built[1].collection.tp
        if _built is not None and alive and _built[0] == parallel:
            return _built[1]
        destroy_groups()
    _built = parallel, build_groups(parallel)
    return _built[1]


@contextmanager
def together() -> Iterator[None]:
    """Around whatever ranks do together.

    Raises:
        VitaError: another rank has ended, or does not answer any more.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        raise VitaError(
            f"rank {rank} of {size}: another rank was lost, so this one ends too. Its own "
            "message says why. If there is none it was killed, most often because memory ran out: lower "
            "--kv-cache-memory or --chunked-prefill-size, or use more ranks; then run again."
        ) from error


class World:
    """Messages between the ranks of one engine. Every method is called by all of them, in the same order."""

    def __init__(self, groups: Groups) -> None:
        """Find the leader, rank 0, and the rank that samples: the first one of the last pipeline stage."""
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.sampler = (groups.pp_size - 1) * groups.tp_size * groups.cp_size
        assert dist.group.WORLD is not None, "build the groups first"
        self._group = dist.group.WORLD
        self._device = torch_device()

    @property
    def leader(self) -> bool:
        """This is rank 0, which takes requests and gives answers."""
        return self.rank == 0

    @property
    def samples(self) -> bool:
        """This rank chooses the next tokens."""
        return self.rank == self.sampler

    def tell(self, message: Any) -> Any:
        """The leader's message, on every rank; `None` costs one small broadcast."""
        if self.size == 1:
            return message
        empty = torch.tensor([message is None], dtype=torch.uint8, device=self._device)
        broadcast_(empty, 0, self._group)
        if empty.item():
            return None
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def tokens(self, chosen: Sequence[int] | None, count: int) -> list[int]:
        """The tokens that the sampling rank chose, on every rank."""
        if self.size == 1:
            return list(chosen or ())
        tensor = torch.tensor(chosen or [0] * count, dtype=torch.int64, device=self._device)
        broadcast_(tensor, self.sampler, self._group)
        return tensor.tolist()

    def details(self, payload: Any) -> Any:
        """What the sampling rank has to say beside tokens, on every rank."""
        if self.size == 1:
            return payload
        box = [payload]
        dist.broadcast_object_list(box, src=self.sampler, group=self._group)
        return box[0]

    def failures(self, own: dict[int, VitaError]) -> dict[int, VitaError]:
        """Errors by request number, of any rank; one small all-reduce where nobody has any."""
        if self.size == 1:
            return own
        some = torch.tensor([len(own)], dtype=torch.int64, device=self._device)
        reduce_(some, self._group)
        if not some.item():
            return {}
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, own, group=self._group)
        return {number: error for errors in reversed(everybody) for number, error in errors.items()}

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        reduce_(tensor, self._group, dist.ReduceOp.MIN)
        return int(tensor.item())
