"""megatron-core's distributed optimizer as checkpoints need it: its parts, its state before the first step, its step.

Without Transformer Engine and Apex its inner optimizer is torch's AdamW. There, in all releases from 0.16.1 to 0.19.2,
`state_dict` asserts that the optimizer has stepped, and `load_state_dict` gives all parameters one shared `step`
tensor, which AdamW then increments once per parameter: a wrong bias correction, without any error. So neither is
called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def distributed_optimizers(optimizer: Any) -> Iterator[Any]:
    """The DistributedOptimizers that a (chained) optimizer consists of."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def use_foreach_kernels() -> None:
    """Where Transformer Engine and Apex are missing, compute gradient norm and clipping by PyTorch's foreach kernels.

    megatron-core's own substitutes read the norm of every parameter on the host, one synchronisation each, and scale
    out of place.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
        clip_grads.multi_tensor_scale_impl = _scale


def _l2_norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """float32 [1]: the norm of all tensors of the first list together. Arguments as apex's."""
    norms = torch.stack(torch._foreach_norm(lists[0]))
    return torch.linalg.vector_norm(norms, dtype=torch.float32).reshape(1), None


def _scale(chunk: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Multiply the tensors of the first list, in place; clipping passes the same list as target."""
    torch._foreach_mul_(lists[0], factor)


def allocate(optimizer: Any) -> None:
    """Give AdamW the state that it has before its first step, if it has none. (megatron-core would take a step with
    zero gradients instead, which counts as a step and applies weight decay.)"""
    for one in distributed_optimizers(optimizer):
        if _is_plain(one) and not one.optimizer.state:
            for parameter in (two for group in one.optimizer.param_groups for two in group["params"] if two.numel()):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                one.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def steps_done(optimizer: Any) -> float:
    """Steps that a (chained) optimizer has done on this rank; 0 if it has no parameters here."""
    found = [0.0]
    for one in distributed_optimizers(optimizer):
        if _is_plain(one):
            found += [float(state["step"]) for state in one.optimizer.state.values()]
        else:
            found += [float(group.get("step") or 0) for group in one.state_dict()["optimizer"]["param_groups"]]
    return max(found)


def set_steps_done(optimizer: Any, steps: float) -> None:
    """Allocate the state of a (chained) optimizer that is to be loaded, and set its step. Its settings stay."""
    allocate(optimizer)
    for one in distributed_optimizers(optimizer):
        if _is_plain(one):
            for state in one.optimizer.state.values():
                state["step"] = torch.tensor(float(steps))
        else:
            state = one.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = int(steps)
            one.load_state_dict(state)


State = tuple[Any, Tensor, int, dict[str, Tensor]]
"""(DistributedOptimizer, parameter, first element of the flattened parameter that this rank holds, its tensors by name:
`param` for the master weight, `exp_avg`, `exp_avg_sq`)."""


def states(optimizer: Any) -> Iterator[State]:
    """What this rank holds of each parameter."""
    for one in distributed_optimizers(optimizer):
        for parameter in one.model_param_group_index_map:
            held = one._get_model_param_range_map(parameter)["param"]
            if held.end > held.start:
                tensors = one._get_main_param_and_optimizer_states(parameter)
                yield one, parameter, held.start, {name: two for name, two in tensors.items() if name != "step"}


@torch.no_grad()
def restore(optimizer: Any, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    """Give loaded tensors back to a DistributedOptimizer that keeps them in another form (Transformer Engine's)."""
    if not _is_plain(optimizer):
        optimizer._set_main_param_and_optimizer_states(parameter, tensors)


def _is_plain(optimizer: Any) -> bool:
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
