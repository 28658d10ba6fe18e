"""Collectives of torch.distributed, answered without other ranks, counted by kind and group.

A rank of a dry run is alone: it has process groups of any size (torch's `fake` backend), and every collective returns
at once. With fake tensors there is nothing to fill in; with real ones (`--dry-run real`) outputs get this rank's own
values in every place, so that numbers stay finite.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vita.dryrun.report import Collective

_FAKE = "fake"


class _Done:
    """Work that is done."""

    def wait(self, *_: Any) -> bool:
        """True at once."""
        return True

    is_completed = wait


class _P2P:
    """A send or receive that waits in a batch (torch's P2POp asks the group's backend for more)."""

    def __init__(self, op: Any, tensor: torch.Tensor, peer: Any = None, group: Any = None, *_: Any, **__: Any) -> None:
        self.op, self.tensor, self.group = op, tensor, group


class Collectives:
    """Counts calls and bytes, and says which storages are communication buffers."""

    def __init__(self, *, real: bool) -> None:
        """Count nothing yet.

        Args:
            real: tensors hold values, so outputs are filled.
        """
        self._real = real
        self.device = torch.device("cuda", 0)
        """Where tensors must be."""
        self._calls: Counter[tuple[str, Any, str]] = Counter()
        self._bytes: Counter[tuple[str, Any, str]] = Counter()
        self.phase = "build"
        """What the program does, for the report."""
        self.buffer: Callable[[torch.Tensor], None] = lambda tensor: None
        """Called with what an all-gather or a receive fills."""

    def restart(self) -> None:
        """Forget what was counted."""
        self._calls.clear()
        self._bytes.clear()

    def counted(self, names: dict[Any, str]) -> list[Collective]:
        """What was counted, largest first; `names` gives process groups a name."""
        found = [
            Collective(kind, names.get(group, "world" if ranks == dist.get_world_size() else "other"),
                       ranks, phase, self._calls[kind, group, phase], nbytes)
            for (kind, group, phase), nbytes in self._bytes.items()
            for ranks in [dist.get_world_size(group)]
        ]  # fmt: skip
        return sorted(found, key=lambda one: -one.nbytes)

    def install(self) -> None:
        """Replace torch.distributed's functions, before megatron-core is imported: it binds some by name."""
        gather = ("all_gather_into_tensor", "_all_gather_base")
        scatter = ("reduce_scatter_tensor", "_reduce_scatter_base")
        for name in gather:
            self._replace(name, lambda output_tensor, input_tensor, **_: self._gathered(output_tensor, input_tensor))
        for name in scatter:
            self._replace(name, lambda output, input, op=None, **_: self._scattered(output, input))
        self._replace("all_reduce", lambda tensor, op=None, **_: ("all_reduce", tensor))
        self._replace("broadcast", lambda tensor, src=None, **_: ("broadcast", tensor))
        self._replace("all_to_all_single", lambda output, input, *_, **__: self._exchanged(output, input))
        self._replace("all_gather", lambda tensor_list, tensor, **_: self._listed(tensor_list, tensor))
        self._replace("barrier", lambda *_, **__: ("barrier", None))
        for name in ("send", "isend"):
            self._replace(name, lambda tensor, *_, **__: ("send", tensor))
        for name in ("recv", "irecv"):
            self._replace(name, lambda tensor, *_, **__: self._received(tensor))
        self._set("batch_isend_irecv", self._batch)
        self._set("P2POp", _P2P)
        self._set("_coalescing_manager", _coalesced)
        self._set("all_gather_object", _all_gather_object)
        self._set("broadcast_object_list", lambda *_, **__: None)
        self._set("new_group", functools.partial(_new_group, dist.new_group))

    def _set(self, name: str, value: Any) -> None:
        setattr(dist, name, value)
        setattr(distributed_c10d, name, value)

    def _replace(self, name: str, answer: Callable[..., tuple[str, torch.Tensor | None]]) -> None:
        def collective(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
            kind, tensor = answer(*args, **kwargs)
            self._count(kind, tensor, group)
            return _Done() if async_op or name in ("isend", "irecv") else None

        self._set(name, collective)

    def _count(self, kind: str, tensor: torch.Tensor | None, group: Any) -> None:
        if tensor is None or dist.get_world_size(group) == 1:
            return
        if tensor.device.type != self.device.type:
            raise RuntimeError(
                f"{kind} of a tensor {list(tensor.shape)} on {tensor.device}: NCCL takes tensors on the GPU alone"
            )
        key = kind, group, self.phase
        self._calls[key] += 1
        self._bytes[key] += tensor.numel() * tensor.element_size()

    def _gathered(self, out: torch.Tensor, local: torch.Tensor) -> tuple[str, torch.Tensor]:
        if self._real:
            out.view(-1, local.numel()).copy_(local.reshape(1, -1).expand(out.numel() // local.numel(), -1))
        self.buffer(out)
        return "all_gather", out

    def _listed(self, outs: list[torch.Tensor], local: torch.Tensor) -> tuple[str, torch.Tensor]:
        if self._real:
            for out in outs:
                out.copy_(local)
        return "all_gather", local.detach().expand(len(outs), *local.shape)

    def _scattered(self, out: torch.Tensor, whole: torch.Tensor) -> tuple[str, torch.Tensor]:
        if self._real:
            out.view(-1).copy_(whole.reshape(-1)[: out.numel()])
        return "reduce_scatter", whole

    def _exchanged(self, out: torch.Tensor, local: torch.Tensor) -> tuple[str, torch.Tensor]:
        if self._real:
            out.zero_()
            common = min(len(out), len(local))
            out[:common].copy_(local[:common])
        return "all_to_all", out if out.numel() > local.numel() else local

    def _received(self, out: torch.Tensor) -> tuple[str, torch.Tensor]:
        if self._real:
            out.zero_()
        self.buffer(out)
        return "recv", out

    def _batch(self, operations: list[_P2P]) -> list[_Done]:
        for one in operations:
            receives = one.op is dist.irecv
            self._count(*(self._received(one.tensor) if receives else ("send", one.tensor)), one.group)
        return [_Done() for _ in operations]


@contextlib.contextmanager
def _coalesced(*_: Any, **__: Any) -> Iterator[_Done]:
    yield _Done()


def _all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)


def _new_group(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return plain(*args, **{**kwargs, "backend": _FAKE})


def start(rank: int, world_size: int) -> None:
    """Initialise torch.distributed as one rank of a world that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(_FAKE, rank=rank, world_size=world_size, store=FakeStore())
