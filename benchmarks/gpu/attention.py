"""Sections about kernels: the machine, parity, the dtype grid, and the schedules of all context ranks on one GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from harness import Figure
from sizes import Size
from torch import Tensor

from megatron_vita import device, kernels
from megatron_vita.checks import attention as reference
from megatron_vita.checks import grid, jobs, kernels_report, ranks
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel import document_attention as attention
from megatron_vita.parallel.exchange import KVExchange
from megatron_vita.parallel.schedule import Schedule, build_schedule


def machine(size: Size, within_s: float) -> Iterator[Figure]:
    """What runs here, and with which kernels."""
    yield Figure("PyTorch", torch.__version__)
    yield Figure("CUDA of PyTorch", torch.version.cuda or "none")
    gpus = device.num_accelerators()
    yield Figure("GPUs", gpus)
    if gpus:
        facts = torch.cuda.get_device_properties(0)
        yield Figure("GPU", facts.name, note=f"compute capability {facts.major}.{facts.minor}")
        yield Figure("memory of the GPU", facts.total_memory / 2**30, "GiB")
    for row in kernels.kernel_table(size.short):
        yield Figure(f"kernel: {row.what}", row.used, note=row.why)


def parity(size: Size, within_s: float) -> Iterator[Figure]:
    """Every fused kernel against its reference implementation, the backward by blocks among them."""
    for check in kernels_report.check_kernels():
        yield Figure(check.name, check.verdict, ok=False if check.broken else None)


def dtype_grid(size: Size, within_s: float) -> Iterator[Figure]:
    """One step of tiny models in every dtype against plain PyTorch, as tools/check_parallel.py does."""
    began = time.monotonic()
    todo = [jobs.case_job(case) for case in grid.make_cases(grid.parse_spec(size.grid, (1,)), (1,))]
    runner = ranks.Forked(limit_s=within_s)
    try:
        for number, job in enumerate(todo):
            if time.monotonic() - began > within_s:
                yield Figure("cases without time", len(todo) - number)
                return
            result = runner.run(job)
            failures = result.failures
            loss = "-" if result.outcome is None else f"{result.outcome.loss:.0e}"
            yield Figure(f"{str(job.dtype).removeprefix('torch.')}: {job.name}", loss, "difference of the loss",
                         not failures, failures[0][:2000] if failures else "")  # fmt: skip
    finally:
        runner.close()


class _Emulated:
    """KVExchange of one rank of a group whose keys and values all lie here; gradients are added where they belong."""

    def __init__(self, kv: Tensor, gradient: Tensor, layout: SequenceLayout, rank: int, schedule: Schedule) -> None:
        self._kv, self._gradient = kv, gradient
        if schedule.comm_type == "p2p":
            sources = [(rank - step) % layout.cp for step in range(layout.cp)]
            self._places = [_positions(layout, source) for source in sources]
        else:
            self._places = [torch.arange(layout.length, device=kv.device)]
        self._number = 0

    def steps(self) -> Iterator[Tensor]:
        """Keys and values of each step."""
        for places in self._places:
            yield self._kv.index_select(0, places)

    def accumulate_grad(self, gradient: Tensor) -> None:
        """Add to the whole row's gradient."""
        self._gradient.index_add_(0, self._places[self._number], gradient)
        self._number += 1

    def finalize_grad(self) -> Tensor:
        """Nothing: it is in the whole row's gradient already."""
        return self._gradient.new_zeros(1, 2, 1, 1)


def _positions(layout: SequenceLayout, rank: int) -> Tensor:
    return torch.from_numpy(layout.local_positions(rank)).to(device.torch_device())


def emulation(size: Size, within_s: float) -> Iterator[Figure]:
    """The block schedules of all context ranks of a packed row, one after the other: a short row against plain float32
    attention, a long one against one flash call."""
    bound = 2e-2 if device.num_accelerators() else 1e-4
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    inputs = _inputs(size, size.short_row)
    want = _with_gradients(partial(reference.document_attention, documents=size.short_row), size, *inputs)
    for kind in ("p2p", "all_gather"):
        got, _ = _all_ranks(size, size.short_row, kind, inputs)
        for name, one, other in zip(names, got, want, strict=True):
            worst = _worst(one, other)
            yield Figure(f"{kind} against plain float32: {name}", worst, "of the largest", worst <= bound)
    inputs = _inputs(size, size.row)
    whole = partial(_attend, *inputs, build_schedule(SequenceLayout(size.row), 0, device.torch_device()), size)
    alone = _seconds(whole)
    note = f"{sum(size.row)} tokens, {len(size.row)} documents, forward and backward"
    yield Figure("one call", alone * 1e3, "ms", note=note)
    for kind in ("p2p", "all_gather"):
        got, seconds = _all_ranks(size, size.row, kind, inputs, timed=True)
        for name, one, other in zip(names, got, whole(), strict=True):
            worst = _worst(one, other)
            yield Figure(f"{kind} against one call: {name}", worst, "of the largest", worst <= bound)
        note = "keys are copied, not sent"
        yield Figure(f"{kind}: {size.ranks} ranks to one call", sum(seconds) / alone, "times", note=note)
        yield Figure(f"{kind}: slowest rank to the mean", max(seconds) / statistics.mean(seconds), "times")


def _inputs(size: Size, row: tuple[int, ...]) -> list[Tensor]:
    """q, k, v and the output's gradient, [tokens, heads, d] each; bfloat16 on a GPU, else float32."""
    dtype = torch.bfloat16 if device.num_accelerators() else torch.float32
    source = torch.Generator().manual_seed(1)
    return [
        torch.randn(sum(row), heads, size.head_dim, generator=source).to(device.torch_device(), dtype)
        for heads in (size.heads[0], size.heads[1], size.heads[1], size.heads[0])
    ]


def _worst(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def _with_gradients(function: Callable[..., Tensor], size: Size, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of the reference, in float32."""
    q, k, v, grad = (x.float() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = function(*leaves, scale=size.head_dim**-0.5)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _all_ranks(
    size: Size, row: tuple[int, ...], kind: str, inputs: list[Tensor], *, timed: bool = False
) -> tuple[list[Tensor], list[float]]:
    """Output and gradients [tokens, heads, d] of the whole row, float32, and the seconds of each rank."""
    layout = SequenceLayout(row, cp=size.ranks)
    got = [torch.zeros_like(x, dtype=torch.float32) for x in (inputs[0], *inputs[:3])]
    seconds = []
    for rank in range(size.ranks):
        step = _Rank(layout, rank, kind, inputs, size)
        if timed:
            seconds.append(_seconds(step.run))
        step.add_to(got)
    return got, seconds


def _attend(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, schedule: Schedule, size: Size) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention.document_attention(*leaves, schedule, None, size.head_dim**-0.5)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


class _Rank:
    """One emulated context rank."""

    def __init__(self, layout: SequenceLayout, rank: int, kind: str, inputs: list[Tensor], size: Size) -> None:
        self._layout, self._rank, self._size = layout, rank, size
        self._schedule = build_schedule(layout, rank, device.torch_device(), kind)
        self._places = _positions(layout, rank)
        self._inputs = [x.index_select(0, self._places) for x in inputs]
        self._kv = torch.stack(inputs[1:3], dim=1)
        self._gradient = torch.zeros_like(self._kv, dtype=torch.float32)

    def run(self) -> tuple[Tensor, ...]:
        """Forward and backward."""

        def start(k: Tensor, v: Tensor, schedule: Schedule, group: Any) -> KVExchange:
            return _Emulated(self._kv, self._gradient, self._layout, self._rank, schedule)

        with mock.patch.object(attention, "_start_exchange", start):
            return _attend(*self._inputs, self._schedule, self._size)

    def add_to(self, totals: list[Tensor]) -> None:
        """Add output and gradients of this rank's tokens, and of all keys, to the whole row's."""
        self._gradient.zero_()
        for total, part in zip(totals, self.run(), strict=True):
            total.index_add_(0, self._places, part.float())
        for total, part in zip(totals[2:], self._gradient.unbind(1), strict=True):
            total += part


def _seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds, after one call to warm up."""
    run()
    found = []
    for _ in range(repeats):
        device.synchronize()
        began = time.perf_counter()
        run()
        device.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)
