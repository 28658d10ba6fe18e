"""What watches a dry run of one rank, and its report. Called in a process of its own (worker.py)."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vita import device
from megatron_vita.dryrun import collectives as answered
from megatron_vita.dryrun.jobs import DryRunJob
from megatron_vita.dryrun.memory import Memory
from megatron_vita.dryrun.mode import DryRunMode, FakeOperationError, counting_pairs, line_of
from megatron_vita.dryrun.modules import ModulePath
from megatron_vita.dryrun.report import Report
from megatron_vita.errors import VitaError
from megatron_vita.kernels import kernel_table
from megatron_vita.models.cached_forward import CachedForward
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel import block_kernels
from megatron_vita.parallel.groups import Groups


class Watch:
    """Memory, operations and collectives of one rank; a context manager in which the program runs."""

    def __init__(self, job: DryRunJob, counted: answered.Collectives, *, fake: bool) -> None:
        """Initialise torch.distributed as the job's rank.

        Args:
            job: the rank.
            counted: the installed collectives.
            fake: tensors are fake CUDA tensors; else they are real, on this process's device.
        """
        self._began = time.monotonic()
        self._job, self._counted, self._fake = job, counted, fake
        answered.start(job.rank, job.world_size)
        target = counted.device = device.torch_device()
        self._modules = ModulePath()
        self.memory = Memory(target, self._modules)
        self.mode = DryRunMode(target, self._modules, self.memory, fake=fake)
        self._stack = contextlib.ExitStack()
        self.before: dict[str, int] = {}
        self._measure = device.has_accelerator() and not fake
        self._measured: dict[str, float] = {}
        self._build_peak = 0

    def __enter__(self) -> Watch:
        faking = FakeTensorMode(allow_non_fake_inputs=True) if self._fake else contextlib.nullcontext()
        for one in (self._modules, faking, self.mode, _scopes(self._modules, self.mode, fake=self._fake)):
            self._stack.enter_context(one)
        self._counted.buffer = lambda tensor: self.memory.part([tensor], "communication")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises FakeOperationError: the program failed; names the module that ran."""
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, FakeOperationError | MemoryError | VitaError):
            line = line_of(traceback.extract_tb(trace))
            raise FakeOperationError(f"{self.mode.last}: {kind.__name__}: {error} ({line})") from error

    def built(self, chunks: Iterable[torch.nn.Module]) -> None:
        """The model chunks are there: name their modules and their parameters."""
        chunks = list(chunks)
        for number, chunk in enumerate(chunks):
            self._modules.name(chunk, f"chunk{number}." if len(chunks) > 1 else "")
        self.memory.part((one.data for chunk in chunks for one in chunk.parameters()), "weights")
        self._build_peak = self.memory.highest

    def restart(self) -> None:
        """What is reported begins here."""
        for one in (self.memory, self.mode, self._counted):
            one.restart()
        self.before = self.memory.parts()
        if self._measure:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._measured = {"before": torch.cuda.memory_allocated(), "began": time.monotonic()}

    def phase(self, name: str) -> None:
        """Name what the program does from here on."""
        self._counted.phase = self.mode.phase = name

    def scope(self, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts as a module of its own."""
        return self._modules.scope(path, function)

    def report(self, groups: Groups, models: Iterable[torch.nn.Module], **values: Any) -> Report:
        """What was seen since `restart`; `values` are fields that only the caller knows."""
        if self._measure:
            torch.cuda.synchronize()
            self._measured |= {
                "step_seconds": time.monotonic() - self._measured.pop("began"),
                "peak": torch.cuda.max_memory_allocated(),
                "after": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        parameters = [one for chunk in models for one in chunk.parameters()]
        peak = self.memory.peak
        return Report(
            stage=self._job.stage.name,
            world_size=self._job.world_size,
            rank=self._job.rank,
            kind=kind_of(groups),
            parameters=sum(one.numel() for one in parameters),
            trainable=sum(one.numel() for one in parameters if one.requires_grad),
            build_peak=self._build_peak,
            before=self.before,
            peak=peak.parts,
            after=self.memory.parts(),
            peak_bytes=self.memory.highest,
            peak_module=peak.path,
            peak_operation=peak.operation,
            peak_in_backward=peak.backward,
            flops=self.mode.flops,
            collectives=self._counted.counted(_group_names(groups)),
            host_syncs=self.mode.host_syncs,
            operations=sum(self.mode.operations.values()),
            attention_calls=self.mode.attention_calls,
            kernels=[str(row) for row in kernel_table(self._job.stage)],
            measured=self._measured,
            seconds=time.monotonic() - self._began,
            **values,
        )


def kind_of(groups: Groups) -> str:
    """What kind of rank this is, by its coordinates."""
    places = (("pp", groups.pp_rank, groups.pp_size), ("cp", groups.cp_rank, groups.cp_size),
              ("tp", groups.tp_rank, groups.tp_size), ("dp", groups.dp_rank, groups.dp_size))  # fmt: skip
    return " ".join(f"{name} {rank}/{size}" for name, rank, size in places)


def _group_names(groups: Groups) -> dict[Any, str]:
    names = ("dp", "dp_cp", "tp", "cp", "pp", "tp_cp", "mp")
    return {getattr(groups.collection, name): name for name in names if hasattr(groups.collection, name)}


@contextlib.contextmanager
def _scopes(modules: ModulePath, mode: DryRunMode, *, fake: bool) -> Iterator[None]:
    """Name what is no module, count attention's FLOPs, and take the kernel that PyTorch would on a GPU."""

    def of_layer(part: str) -> Callable[..., str]:
        return lambda self, layer, *_: f"language_model.decoder.layers.{self._layers.index(layer)}.{part}"

    replaced: list[tuple[Any, str, Any]] = [
        (CachedForward, "_run_layers", modules.scope("language_model.decoder", CachedForward._run_layers)),
        (CachedForward, "_attention", modules.scope(of_layer("self_attention"), CachedForward._attention)),
        (CachedForward, "_mlp", modules.scope(of_layer("mlp"), CachedForward._mlp)),
        (VitaModel, "_visual_tokens", modules.scope("vision", VitaModel._visual_tokens)),
        (VitaModel, "_losses", modules.scope("language_model.output_layer", VitaModel._losses)),
        (block_kernels, "forward", counting_pairs(mode, block_kernels.forward, products=2)),
        (block_kernels, "backward", counting_pairs(mode, block_kernels.backward, products=5)),
    ]
    if fake:
        replaced.append((F, "scaled_dot_product_attention", _sdpa))
        replaced.append((torch.cuda, "synchronize", lambda *_: mode.add_sync("waits for all kernels")))
    plain = [getattr(where, name) for where, name, _ in replaced]
    for where, name, new in replaced:
        setattr(where, name, new)
    try:
        yield
    finally:
        for (where, name, _), old in zip(replaced, plain, strict=True):
            setattr(where, name, old)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """PyTorch's choice on a GPU in half precision without a mask, flash attention; fake tensors get the unfused one.

    In float32 a GPU takes the memory-efficient kernel, which keeps as much. A mask would be a TypeError.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: torch.Tensor = flash(query, key, value, scale=scale)[0]
    return out
