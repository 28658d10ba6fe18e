"""Sees every operation of a dry run: memory, FLOPs, host synchronisations, and mistakes of device, dtype or shape.

On fake tensors it answers what only values could: a number that the host reads is 1, a truth value is False.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_vita.dryrun.memory import Memory, workspace_bytes
from megatron_vita.dryrun.modules import ModulePath
from megatron_vita.dryrun.report import HostSync

_COUNTED_BY_PAIRS = ("aten::_flash_attention_forward", "aten::_flash_attention_backward")
_READS = {
    "aten::_local_scalar_dense": "reads a scalar",
    "aten::nonzero": "needs the number of elements that are not zero",
    "aten::masked_select": "needs the number of selected elements",
    "aten::equal": "compares on the host",
    "aten::is_nonzero": "reads a scalar",
    "aten::_unique2": "needs the number of different elements",
    "aten::bincount": "needs the largest element",
}
_COPIES = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_PRODUCTS = (
    "aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_", "aten::convolution",
)  # fmt: skip
_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products that torch's table of FLOPs lacks -> those that do the same out of place."""


class FakeOperationError(Exception):
    """An operation that a GPU would refuse, with the module that ran it."""


class DryRunMode(TorchDispatchMode):
    """Watches operations on one device."""

    def __init__(self, device: torch.device, modules: ModulePath, memory: Memory, *, fake: bool) -> None:
        super().__init__()
        self._device, self._modules, self._memory, self._fake = device, modules, memory, fake
        self.flops = 0
        self.attention_calls = 0
        self.operations: Counter[str] = Counter()
        self._syncs: Counter[tuple[str, str, str]] = Counter()
        self.phase = "build"
        self.last = ""
        """Where the last operation ran: module and direction."""
        self._in_fused = False

    def restart(self) -> None:
        """Forget what was counted."""
        self.flops = self.attention_calls = 0
        self.operations.clear()
        self._syncs.clear()

    @property
    def host_syncs(self) -> list[HostSync]:
        """Host synchronisations since `restart`, most frequent first."""
        return [HostSync(*key, count) for key, count in self._syncs.most_common()]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func._can_decompose():  # composite operations come whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        name = func.name().partition(".")[0]
        self.operations[name] += 1
        self.last = f"{self._modules.now}, {'backward' if self._modules.in_backward else 'forward'}"
        self._find_sync(name, args, kwargs)
        if self._fake and name == "aten::_local_scalar_dense":
            return _scalar(func, args[0])
        if name in _PRODUCTS:
            self._check_product(name, args)
        try:
            out = func(*args, **kwargs)
        except MemoryError:
            raise
        except Exception as error:
            needs_values = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
            reason = "the host would wait for values, and fake tensors have none" if needs_values else error
            raise FakeOperationError(f"{self.last}: {name} of {_described(args)}: {reason} ({_line()})") from error
        if kwargs.get("pin_memory"):
            out.untyped_storage().pinned = True
        if not self._in_fused:
            self._memory.watch(out, name, workspace=workspace_bytes(name, args))
        if name not in _COUNTED_BY_PAIRS and (formula := _flop_formula(func)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def run_fused(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that a compiler makes one kernel of: it allocates its outputs only."""
        outer, self._in_fused = self._in_fused, True
        try:
            out = function(*args, **kwargs)
        finally:
            self._in_fused = outer
        if not outer:
            self._memory.watch(out, f"fused {function.__name__}")
        return out

    def add_attention(self, flops: int) -> None:
        """Count a call of an attention kernel, whose lengths are values that no shape tells."""
        self.flops += flops
        self.attention_calls += 1

    def _check_product(self, name: str, args: tuple[Any, ...]) -> None:
        """Shape functions of matrix products take any dtypes; cuBLAS takes one."""
        kinds = {one.dtype for one in args if isinstance(one, torch.Tensor)}
        if len(kinds) > 1:
            raise FakeOperationError(f"{self.last}: {name} of {_described(args)}: the dtypes differ ({_line()})")

    def _on(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self._device.type

    def _find_sync(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        what = _READS.get(name) if args and self._on(args[0]) else None
        if name in _COPIES:
            what = self._copy(name, args, kwargs)
        elif name in _INDEXING and self._on(args[0]):
            what = self._index(args)
        elif name == "aten::repeat_interleave" and len(args) == 1 and self._on(args[0]):
            what = None if kwargs.get("output_size") is not None else "needs the number of repeated elements"
        if what is not None:
            self.add_sync(what)

    def add_sync(self, what: str) -> None:
        """Count a host synchronisation of the line that is running."""
        self._syncs[what, _line(), self.phase] += 1

    def _index(self, args: tuple[Any, ...]) -> str | None:
        """What makes the host wait in a selection by indices."""
        indices = [one for one in args[1] if isinstance(one, torch.Tensor)]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            # With a number of the host as value PyTorch calls masked_fill.
            filled = len(args) > 2 and args[2].numel() == 1 and not self._on(args[2])
            return None if filled else "a mask as an index needs its number of elements"
        return None if all(map(self._on, indices)) else "copies an index from the host"

    def _copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What makes the host wait in a copy between host and device; None: nothing."""
        if name == "aten::copy_":
            source, to, non_blocking = args[1], args[0].device, len(args) > 2 and args[2]
        else:
            source, to, non_blocking = args[0], torch.device(kwargs.get("device") or args[0].device), False
        non_blocking = kwargs.get("non_blocking", non_blocking)
        if not isinstance(source, torch.Tensor) or source.device.type == to.type or not source.numel():
            return None
        if source.device.type == self._device.type:
            # `to` takes page-locked memory by itself.
            waits = not non_blocking or (name == "aten::copy_" and not _is_pinned(args[0]))
            return "copies to the host" if waits else None
        if to.type != self._device.type:
            return None
        pinned = _is_pinned(source)
        if non_blocking and pinned:
            return None
        return "copies from the host, " + ("blocking" if pinned else "from memory that is not pinned")


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator in torch.compile's place: the function is one kernel for the DryRunMode in which it is called."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mode = next((one for one in _get_current_dispatch_mode_stack() if isinstance(one, DryRunMode)), None)
        return function(*args, **kwargs) if mode is None else mode.run_fused(function, *args, **kwargs)

    return call


def _scalar(func: Any, tensor: torch.Tensor) -> Any:
    """The value of a tensor with one element, made up where it is not known.

    Args:
        func: the operation that reads it.
        tensor: real, or fake; the values of some fake ones are known, as of `torch.tensor(3)`.
    """
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
        with _disable_current_modes():
            return func(tensor)
    try:
        return func(tensor)
    except DataDependentOutputException:
        return {torch.bool: False}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)


def _is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a host tensor lies in page-locked memory; of a fake one, whether that was asked for."""
    if type(tensor) is torch.Tensor:
        with _disable_current_modes():
            return tensor.is_pinned()
    return getattr(tensor.untyped_storage(), "pinned", False)


def _flop_formula(func: Any) -> Callable[..., int] | None:
    packet = func._overloadpacket
    formula: Callable[..., int] | None = flop_registry.get(_IN_PLACE.get(packet, packet))
    return formula


def _line() -> str:
    """The line that is running, see `line_of`."""
    return line_of(traceback.extract_stack())


def line_of(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of megatron_vita or megatron-core, as `package/file.py:12`."""
    for frame in reversed(frames):
        path = frame.filename.replace("\\", "/")
        for package in ("megatron_vita/", "megatron/"):
            start = path.rfind("/" + package)
            if start >= 0 and "/megatron_vita/dryrun/" not in path:
                return f"{path[start + 1 :]}:{frame.lineno}"
    return "elsewhere"


def _described(args: tuple[Any, ...]) -> str:
    tensors = [one for one in tree_leaves(list(args)) if isinstance(one, torch.Tensor)]
    return ", ".join(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)} on {one.device}" for one in tensors)


def counting_pairs(mode: DryRunMode, forward: Callable[..., Any], *, products: int) -> Callable[..., Any]:
    """A block kernel that adds its FLOPs: `products` matrix products over the query-key pairs of its blocks."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        blocks = kwargs.get("blocks") or next(one for one in args if hasattr(one, "pairs"))
        query, before = args[0], mode.flops
        out = forward(*args, **kwargs)
        mode.flops = before  # the reference kernels' own products are those of the pairs, masked ones among them
        mode.add_attention(2 * products * blocks.pairs * query.shape[-2] * query.shape[-1])
        return out

    return counted
