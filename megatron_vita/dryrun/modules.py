"""Which module runs: its path in the model, in the forward, in the backward, and in recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

OUTSIDE = "outside the model"


class ModulePath:
    """Knows the path of the module that runs, from hooks on every module; a context manager.

    In the forward it is the innermost module. In the backward it is the module whose output's gradient arrived last:
    operations between two modules count to the one before them in the backward's order. Unlike
    torch.utils.module_tracker it sees modules that are called with keywords alone, as megatron-core calls its layers.
    """

    def __init__(self) -> None:
        self._names: dict[nn.Module, str] = {}
        self._stack: list[tuple[str, int]] = []
        self._backward = (OUTSIDE, 0)
        self._hooks: list[Any] = []
        self.clock: Callable[[], int] = lambda: 0
        """Serial number of the last allocation; the time at which a module is entered."""

    def name(self, model: nn.Module, prefix: str) -> None:
        """Name the modules of a model chunk."""
        self._names.update({module: f"{prefix}{name}".rstrip(".") or "model" for name, module in model.named_modules()})

    @property
    def now(self) -> str:
        """Path of the module that runs."""
        if self._stack:
            return self._stack[-1][0]
        return self._backward[0] if self.in_backward else OUTSIDE

    @property
    def in_backward(self) -> bool:
        """The autograd engine runs (it also runs recomputation)."""
        return bool(torch._C._current_graph_task_id() != -1)

    def since(self) -> int:
        """Serial number of the last allocation before the current decoder or tower layer was entered."""
        layer = layer_of(self.now)
        for path, entered in self._stack:
            if layer_of(path) == layer:
                return entered
        return self._backward[1]

    def scope(self, path: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts as a module of its own.

        Args:
            path: the module's path, or a function of the arguments that gives it.
            function: what is called.
        """

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            here = path if isinstance(path, str) else path(*args, **kwargs)
            self._stack.append((here, self.clock()))
            try:
                out = function(*args, **kwargs)
            finally:
                self._stack.pop()
            self._watch(here, out)
            return out

        return inside

    def __enter__(self) -> ModulePath:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),  # recomputation ends in an exception
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._stack.append((self._names.get(module, self.now), self.clock()))

    def _leave(self, module: nn.Module, _: Any, out: Any) -> None:
        path, _ = self._stack.pop()
        self._watch(path, out)

    def _watch(self, path: str, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(functools.partial(self._gradient_arrives, path))

    def _gradient_arrives(self, path: str, _: Any) -> None:
        same_layer = layer_of(path) == layer_of(self._backward[0])
        self._backward = (path, self._backward[1] if same_layer else self.clock())


def layer_of(path: str) -> str:
    """Path of the transformer layer that a module is in, `...decoder.layers.3`; the path itself outside of layers."""
    parts = path.split(".")
    if "layers" in parts[:-1]:
        return ".".join(parts[: parts.index("layers") + 2])
    return path
