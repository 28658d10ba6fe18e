"""Live bytes of a device while a program runs, by part and by module: from the storages that operations return.

A storage counts from the operation that returned it until its last reference is gone, in blocks of 512 bytes as
PyTorch's caching allocator gives them. What a kernel allocates for itself and frees before it returns is added while it
runs (`workspace_bytes`). Not counted: what `UntypedStorage.resize_` frees, which PyTorch does not dispatch and nothing
here calls; fragmentation, cuBLAS's and NCCL's own memory, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from megatron_vita.dryrun.modules import OUTSIDE, ModulePath, layer_of

_BLOCK = 512
"""Bytes in which PyTorch's CUDA caching allocator rounds up (c10/cuda/CUDACachingAllocator: kMinBlockSize)."""
_SNAPSHOT_GROWTH = 1.001
"""A peak is described anew when it exceeds the one described by this factor: describing walks all storages."""
PERSISTENT = ("weights", "gradients", "optimizer")
"""Parts that live as long as the training stage."""


@dataclass(slots=True)
class _Storage:
    reference: Any
    nbytes: int
    part: str | None
    path: str
    serial: int
    backward: bool


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of the largest number of live bytes."""

    nbytes: int
    parts: dict[str, int]
    """Bytes by part."""
    path: str
    """Module that ran."""
    operation: str
    backward: bool


class Memory:
    """Live bytes of one device."""

    def __init__(self, device: torch.device, modules: ModulePath) -> None:
        self._device, self._modules = device, modules
        self._live: dict[int, _Storage] = {}
        self._serial = 0
        self.now = 0
        """Live bytes."""
        self.peak = Peak(0, {}, OUTSIDE, "", False)
        self._highest = 0
        modules.clock = lambda: self._serial

    @property
    def highest(self) -> int:
        """Most live bytes since `restart`."""
        return self._highest

    def restart(self) -> None:
        """Forget the peak so far."""
        self._highest = 0
        self.peak = Peak(0, {}, OUTSIDE, "", False)
        self._reach(0, "")

    def watch(self, out: Any, operation: str, *, workspace: int = 0) -> None:
        """Count the storages of an operation's outputs, and its workspace while it ran."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device.type:
                self._count(tensor)
        self._reach(workspace, operation)

    def part(self, tensors: Iterable[torch.Tensor | None], name: str) -> None:
        """Say which part the storages of some tensors belong to.

        Weights, gradients and optimizer state stay what they are where communication fills them.
        """
        for tensor in tensors:
            if tensor is not None and tensor.device.type == self._device.type:
                self._count(tensor)
                storage = self._live.get(tensor.untyped_storage()._cdata)
                if storage is not None and not (name == "communication" and storage.part in PERSISTENT):
                    storage.part = name

    def parts(self) -> dict[str, int]:
        """Live bytes by part."""
        layer, since = layer_of(self._modules.now), self._modules.since()
        totals: Counter[str] = Counter()
        for storage in self._live.values():
            totals[self._part_of(storage, layer, since)] += storage.nbytes
        return dict(totals)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        nbytes = _up(storage.nbytes(), _BLOCK)
        if known is not None and known.reference() is not None:
            self.now += nbytes - known.nbytes  # `out=` may have made it larger
            known.nbytes = nbytes
            return
        self._serial += 1

        def gone(reference: Any) -> None:
            entry = self._live.get(key)
            if entry is not None and entry.reference is reference:
                del self._live[key]
                self.now -= entry.nbytes

        reference = weakref.ref(storage, gone)
        backward = self._modules.in_backward
        self._live[key] = _Storage(reference, nbytes, None, self._modules.now, self._serial, backward)
        self.now += nbytes

    def _reach(self, workspace: int, operation: str) -> None:
        reached = self.now + workspace
        self._highest = max(self._highest, reached)
        if reached <= self.peak.nbytes * _SNAPSHOT_GROWTH:
            return
        parts = self.parts()
        if workspace:
            parts["working set"] = parts.get("working set", 0) + workspace
        self.peak = Peak(reached, parts, self._modules.now, operation, self._modules.in_backward)

    def _part_of(self, storage: _Storage, layer: str, since: int) -> str:
        if storage.part is not None:
            return storage.part
        if "vision" in storage.path:
            return "tiles"
        if "output_layer" in storage.path:
            return "head"
        of_layer = layer_of(storage.path)
        passing = storage.backward or of_layer in (OUTSIDE, "gradients", "optimizer")  # session phases, no modules
        if passing or (of_layer == layer and storage.serial > since):
            return "working set"
        return "kept activations"


def workspace_bytes(name: str, args: Any) -> int:
    """Bytes that a kernel allocates for itself, and frees before it returns: flash attention's backward.

    A float32 accumulator of the queries' gradient and a float32 row sum; heads are padded to a multiple of 32. Of
    batches (pytorch/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd) the tokens are padded to
    a multiple of 128; of documents (mha_varlen_bwd) 128 more rows each, and, where key/value heads are shared,
    gradients of keys and values for every query head.

    Args:
        name: the operation's name.
        args: its arguments; query and key are `[batch, heads, tokens, head size]` or `[tokens, heads, head size]`.
    """
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        batch, heads, tokens, size = args[1].shape
        return int(4 * batch * heads * _up(tokens, 128) * (_up(size, 32) + 1))
    if name != "aten::_flash_attention_backward":
        return 0
    query, key, bounds = args[1], args[2], args[6]
    tokens, heads, size = query.shape
    wide = 4 * (tokens + 128 * (len(bounds) - 1)) * heads * (_up(size, 32) + 1)
    expanded = 0 if key.shape[1] == heads else 2 * key.shape[0] * heads * key.shape[2] * key.element_size()
    return int(wide + expanded)


def _up(value: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-value // step) * step
