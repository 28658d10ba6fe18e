"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vita.config import StageConfig
from megatron_vita.planning.flops import step_flops
from megatron_vita.planning.hardware import USABLE, Efficiency, Hardware
from megatron_vita.planning.search import Candidate, Found, Request, describe

GIB = 1024**3


def assumptions(hardware: Hardware, efficiency: Efficiency) -> str:
    """The figures that the times stand on."""
    return (
        f"{hardware.name}: {hardware.bf16 / 1e12:.0f} TFLOP/s bf16, "
        f"{hardware.memory_bandwidth / 1e12:.2f} TB/s memory, "
        f"{hardware.nvlink / 1e9:.0f} GB/s NVLink,\n  {hardware.network / 1e9:.0f} GB/s network a GPU; "
        f"assumed reached: {efficiency.matrices:.0%} in matrix products, {efficiency.attention:.0%} in attention, "
        f"{efficiency.memory:.0%} of memory, {efficiency.links:.0%} of links"
    )


def heading() -> str:
    """The table's first line."""
    return (
        f"{'stage':10} {'weights':>8} {'grads':>7} {'optim':>7} {'kept':>7} {'beside':>7} {'total':>7} {'peak':>9} "
        f"{'tokens/step':>12} {'PFLOP/step':>11} {'s/step':>8} {'tokens/s':>10} {'MFU':>6} {'hours':>7}  limited by"
    )


def line(one: Candidate, request: Request) -> str:
    """A stage: memory in GiB of the pipeline rank with the most, and time."""
    stage, memory, time = one.stage, one.memory, one.time
    beside = memory.working_set + memory.communication
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, beside, memory.total)
    shown = " ".join(f"{part / GIB:{width}.2f}" for part, width in zip(parts, (8, 7, 7, 7, 7, 7), strict=True))
    hours = time.seconds * stage.train.train_iters / 3600
    return (
        f"{stage.name:10} {shown} {memory.peak_at:>9} {time.tokens:12,} "
        f"{step_flops(stage, request.row_of(stage)) / 1e15:11.3f} {time.seconds:8.2f} {time.tokens_per_second:10,.0f} "
        f"{time.mfu:6.1%} {hours:7.1f}  {time.limit} ({time.parts[time.limit] / time.seconds:.0%})"
    )


def suggestions(found: Found, gpus: int, own: Candidate) -> list[str]:
    """The ranked list of a search, and what did not fit."""
    out = []
    for number, one in enumerate(found.fitting, 1):
        time = one.time
        bubble = f", bubble {time.bubble / time.seconds:.0%}" if time.bubble else ""
        faster = time.tokens_per_second / own.time.tokens_per_second
        out.append(
            f"  {number:2}. {describe(one.stage, gpus):58} {one.memory.total / GIB:6.1f} GiB "
            f"{time.tokens_per_second:10,.0f} tokens/s ({faster:.2f}x) MFU {time.mfu:.1%}{bubble}, "
            f"limited by {time.limit}"
        )
    if not found.fitting:
        out.append("  no layout fits")
    for one in found.nearest:
        out.append(
            f"   -  {describe(one.stage, gpus):58} {one.memory.total / GIB:6.1f} GiB, {one.over / GIB:.1f} too many "
            f"at {one.time.tokens_per_second:,.0f} tokens/s: {one.remedy}"
        )
    return out


def verdict(stages: Sequence[tuple[StageConfig, float]], memory: float) -> tuple[str, bool]:
    """Whether every stage fits: a line, and the answer."""
    limit = f"{USABLE:.0%} of {memory / GIB:.0f} GiB"
    over = [(stage, total - USABLE * memory) for stage, total in stages if total > USABLE * memory]
    if not over:
        return f"every stage fits into {limit}", True
    named = ", ".join(f"{stage.name} by {by / GIB:.1f} GiB" for stage, by in over)
    return f"over {limit}: {named}. Raise tp, pp or cp, or recompute more; --search says which layouts fit.", False
