"""Reports of dry runs as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vita.dryrun.jobs import DryRunJob
from megatron_vita.dryrun.report import Report
from megatron_vita.planning.hardware import USABLE

GIB = 1024**3
_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "kept activations",
    "working set",
    "tiles",
    "head",
    "communication",
    "cache",
)
_COLUMNS = ("weights", "grads", "optim.", "kept", "working", "tiles", "head", "comm.", "cache", "total")


def stage_line(job: DryRunJob) -> str:
    """Name, length and layout of a job's stage."""
    stage, world_size = job.stage, job.world_size
    parallel = stage.parallel
    tokens, after = f"{stage.data.seq_length:,}", f", {parallel.recompute_granularity or 'no'} recomputation"
    if job.prompt_tokens:
        tokens, after = f"a prompt of {job.prompt_tokens:,}", ", inference"
    return (
        f"{stage.name}: {tokens} tokens, {world_size} ranks: "
        f"tp{parallel.tensor_model_parallel_size} pp{parallel.pipeline_model_parallel_size} "
        f"cp{parallel.context_parallel_size} ({parallel.cp_comm_type}) dp{parallel.data_parallel_size(world_size)}"
        f"{after}"
    )


def lines(report: Report, gpu_memory: float) -> Iterator[str]:
    """One rank's report.

    Args:
        report: of a rank.
        gpu_memory: memory of a GPU in GiB.
    """
    yield f"  rank {report.rank}" + (f" ({report.kind})" if report.kind else "")
    if report.error is not None:
        yield f"    FAILED: {report.error}"
        return
    row = f"row of {report.documents} documents, {report.tiles} tiles and {report.labelled:,} labelled tokens"
    yield f"    {report.parameters:,} parameters, {report.trainable:,} trained; {row} on this rank"
    if report.micro_batches_in_step:
        yield f"    {report.micro_batches} of {report.micro_batches_in_step} micro-batches of a step"
    yield "    GiB     " + "".join(f"{name:>9}" for name in _COLUMNS)
    for name, parts in (("before", report.before), ("peak", report.peak), ("after", report.after)):
        values = [parts.get(part, 0) for part in _PARTS]
        shown = "".join(f"{value / GIB:9.2f}" for value in (*values, sum(values)))
        yield f"    {name:8}{shown}"
    where = "backward" if report.peak_in_backward else "forward"
    yield f"    peak in {report.peak_module} ({where}, {report.peak_operation})"
    if report.collectives:
        yield "    communication        group  ranks   calls        MiB  when"
    for one in report.collectives:
        yield (
            f"      {one.kind:18} {one.group:>6} {one.ranks:6} {one.calls:7} {one.nbytes / 2**20:10,.1f}  {one.phase}"
        )
    for sync in report.host_syncs:
        yield f"    host waits {sync.count} times in {sync.phase}: {sync.line} {sync.what}"
    yield (
        f"    {report.flops / 1e12:,.1f} TFLOP, {report.attention_calls} calls of attention kernels, "
        f"{report.operations:,} operations"
    )
    if report.measured:
        shown = ", ".join(
            f"{name} {report.measured[name] / GIB:.2f}" for name in ("before", "peak", "after", "reserved")
        )
        yield f"    measured, GiB: {shown}; {report.measured['step_seconds']:.3f} s a step"
    limit = USABLE * gpu_memory
    verdict = "fits" if fits(report, gpu_memory) else "DOES NOT FIT"
    yield f"    {verdict}: {report.peak_bytes / GIB:.2f} of {limit:.1f} GiB ({USABLE:.0%} of {gpu_memory:g})"


def fits(report: Report, gpu_memory: float) -> bool:
    """The peak is within the usable part of a GPU's memory in GiB."""
    return report.error is None and report.peak_bytes <= USABLE * gpu_memory * GIB


def comparison(dry: Report, real: Report) -> str:
    """A dry run beside the same steps on a GPU: bytes of the allocator over bytes predicted."""
    if not real.measured or not dry.peak_bytes:
        return "    nothing to compare"
    before = real.measured["before"] / max(1, sum(dry.before.values()))
    return (
        f"    measured / dry run: before {before:.3f}, peak {real.measured['peak'] / dry.peak_bytes:.3f}; the peak "
        f"of live tensors in the real run / dry run: {real.peak_bytes / dry.peak_bytes:.3f}"
    )
