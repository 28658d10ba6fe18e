"""All ranks come to the same end: what one finds wrong is raised on every one, so that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_vita.errors import CheckpointError, DamagedError, VitaError

T = TypeVar("T")


def on_rank_zero(act: Callable[[], T]) -> T:
    """Do something on rank 0; its result, or its error, on every rank.

    Questions about files are asked so, too: other ranks may see a shared folder late, and must come to one answer.
    """
    import torch.distributed as dist

    from megatron_vita import device

    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except VitaError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = CheckpointError(f"rank 0 cannot read or write a checkpoint: {error}")
    dist.broadcast_object_list(outcome, src=0, device=device.torch_device())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def all_true(mine: bool) -> bool:
    """Whether something holds on every rank."""
    import torch
    import torch.distributed as dist

    from megatron_vita import device

    found = torch.tensor(int(mine), device=device.torch_device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found.item())


def everywhere(act: Callable[[], T], where: str) -> T:
    """Do something on every rank; if it fails on one, raise the same error on all, so that nobody waits for ever.

    Raises:
        DamagedError: every rank that failed found damage.
        CheckpointError: a rank failed otherwise.
    """
    import torch.distributed as dist

    result: Any = None
    error = (False, "")
    try:
        result = act()
    except (VitaError, OSError) as problem:
        error = (isinstance(problem, DamagedError), str(problem))
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    damaged, first = min((one for one in errors if one[1]), default=error)  # damage last: a good one is not renamed
    if first:
        raise (DamagedError if damaged else CheckpointError)(first if where in first else f"{where}: {first}")
    return result
