"""Text of the report: the table of cases and the excluded pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from megatron_vita.checks.compare import Outcome
from megatron_vita.checks.jobs import RankJob
from megatron_vita.checks.kernels_report import KernelCheck
from megatron_vita.checks.ranks import Result

_LEGEND = (
    "loss: relative difference. gradient: worst tensor, relative to its largest element (bf16: 1 - cosine).",
    "weight: after one step of SGD, relative to the tensor's largest (float64), or of AdamW, in learning rates.",
)


def heading(width: int) -> str:
    """The lines above the table; `width` is the longest job's name."""
    columns = f"{'ranks':>5}  {'case':{width}}  {'loss':>7}  {'gradient':>8}  {'weight':>7}  {'s':>5}  worst gradient"
    return "\n".join([*_LEGEND, columns])


def before(job: RankJob, width: int) -> str:
    """The beginning of a line, printed before the job runs, so that it names a job that crashes."""
    return f"{job.world_size:5}  {job.name:{width}}"


def after(result: Result) -> str:
    """The rest of a line, and below it the failures."""
    if result.outcome is None:
        numbers = f"{'-':>7}  {'-':>8}  {'-':>7}  {result.seconds:5.1f}"
    else:
        outcome = result.outcome
        gradient, weight = outcome.worst_gradient(), outcome.worst_weight()
        numbers = (
            f"{outcome.loss:7.0e}  {gradient.gradient(outcome.by_cosine):8.0e}  "
            f"{weight.weight:7.0e}  {result.seconds:5.1f}  {gradient.name}"
        )
    failures = result.failures
    lines = [numbers, *(f"      FAILED {line}" for line in failures[:1])]
    if len(failures) > 1:
        lines.append(f"             and {len(failures) - 1} more, among them {failures[1]}")
    return "  " + "\n".join(lines)


def summary(
    results: Sequence[Result],
    planned: int,
    seconds: float,
    excluded: Mapping[str, Sequence[str]],
    kernels: Sequence[KernelCheck],
) -> list[str]:
    """The last lines."""
    counts = Counter(str(result.job.dtype).removeprefix("torch.") for result in results)
    kinds = ", ".join(f"{count} in {dtype}" for dtype, count in counts.items())
    lines = [f"{len(results)} of {planned} cases ({kinds}) in {seconds:.0f} s"]
    if excluded:
        pairs = sum(len(one) for one in excluded.values())
        lines.append(f"excluded: {pairs} pairs of values that go together in no layout; --list says why")
    for dtype in dict.fromkeys(result.job.dtype for result in results):
        outcomes = [result.outcome for result in results if result.outcome and result.outcome.dtype == dtype]
        if outcomes:
            lines.append(_worst_of(dtype, outcomes))
    failed = [result for result in results if result.failures]
    if failed:
        first = failed[0]
        lines.append(f"FAILED: {len(failed)} of {len(results)}; the first: {first.job.name}: {first.failures[0]}")
    elif broken := [kernel for kernel in kernels if kernel.broken]:
        lines.append(f"FAILED: fused {broken[0].name} differs from its reference implementation")
    elif len(results) < planned:
        lines.append(f"FAILED: {planned - len(results)} cases were not run")
    else:
        lines.append(f"all {len(results)} cases are one process's model")
    return lines


def listing(jobs: Sequence[RankJob], excluded: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What `--list` prints."""
    for number, job in enumerate(jobs, 1):
        yield f"{number:3}  {job.world_size} ranks  {job.name}"
    for reason, pairs in excluded.items():
        yield f"excluded, {reason}"
        yield f"    {'; '.join(pairs)}"


def _worst_of(dtype: torch.dtype, outcomes: Sequence[Outcome]) -> str:
    bounds = outcomes[0].bounds
    gradient = max(one.worst_gradient().gradient(one.by_cosine) for one in outcomes)
    text = (
        f"  {str(dtype).removeprefix('torch.'):8} worst loss {max(one.loss for one in outcomes):.1e} "
        f"(allowed {bounds.loss:.0e}), gradient {gradient:.1e} ({bounds.gradient:.0e})"
    )
    if bounds.whole is not None:
        text += f", all gradients together {max(one.whole() for one in outcomes):.1e} ({bounds.whole:.0e})"
    if bounds.weight is not None:
        text += f", weight {max(one.worst_weight().weight for one in outcomes):.1e} ({bounds.weight:.0e})"
    return text
