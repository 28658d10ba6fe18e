"""Count what makes a host wait for a GPU: host data that goes to the device, and device data that the host reads."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class Copies(TorchDispatchMode):
    """Sees every operation while it is active, in the backward as well. Tests use the `meta` device for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[str] = []
        """Operations that took a tensor on the CPU and gave one on the device; numbers (0-dim) are kernel arguments."""
        self.reads: list[str] = []
        """Operations whose results' shape or value the host reads from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if name in _READS and any(one.is_meta for one in given):
            self.reads.append(name)
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor) and one.is_meta]
        if made and any(not one.is_meta and (one.dim() or name == "_to_copy") for one in given):
            self.to_device.append(name)
        return out
