"""Watch allocations: bytes alive at once, and the largest tensors that an operation makes, with who asked for them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Sees every operation while it is active, in the backward and inside autograd functions as well."""

    def __init__(self, on_new: Callable[[torch.Tensor, list[str]], None] | None = None) -> None:
        super().__init__()
        self.live = 0
        """Bytes of storages made since the start that are still alive."""
        self.peak = 0
        self._on_new = on_new
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for one in _tensors(out):
            storage = one.untyped_storage()
            if storage.data_ptr() in given or storage in self._known or not storage.nbytes():
                continue
            self._known.add(storage)
            weakref.finalize(storage, self._freed, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            if self._on_new is not None:
                self._on_new(one, _callers())
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


def _callers() -> list[str]:
    """`file:function` of the frames above, innermost first, torch's own left out."""
    names = []
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.endswith("watch.py"):
            names.append(f"{path}:{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return names
