"""The fused block kernels against the reference implementation, for tools that check a machine before a long job.

The kernels for GPUs were never run where this was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_vita import device
from megatron_vita.kernels import Attention, of_program, why_not
from megatron_vita.parallel import block_kernels, flash
from megatron_vita.parallel.block_kernels import Blocks

KERNELS = (Attention.CPU_FLASH, *flash.KERNELS)
"""Arguments of `parity`."""

_CAUSAL = ((1, 70, 70), (2, 1, 1), (1, 300, 300))
_FULL = ((1, 70, 9), (2, 1, 130), (1, 64, 300))
_SCALE = 0.125


def parity(kernel: Attention) -> float | str:
    """Compare a kernel with the reference implementation, on blocks of uneven lengths and grouped heads.

    Args:
        kernel: one of KERNELS.

    Returns:
        the largest difference of output, log-sum-exp and gradients, each relative to its largest value (float32 on CPU:
        below 1e-5; bfloat16 on a GPU: below 0.02); or `not installed`, with the reason, where the kernel cannot run.
    """
    missing = None
    if kernel is not Attention.CPU_FLASH:
        missing = why_not(kernel) or (None if of_program().variable_length else "no GPU")
    if missing is not None:
        return f"not installed: {missing}"
    return max(_difference(kernel, runs, causal) for runs, causal in ((_CAUSAL, True), (_FULL, False)))


def _difference(kernel: Attention, runs: tuple[tuple[int, int, int], ...], causal: bool) -> float:
    blocks = Blocks(runs, causal)
    where, dtype = torch.device("cpu"), torch.float32
    if kernel is not Attention.CPU_FLASH:
        where, dtype = device.torch_device(), torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    rows, keys = (sum(run[0] * run[side] for run in runs) for side in (1, 2))
    q, grad, k, v = (
        torch.randn(count, heads, 64, generator=generator).to(where, dtype)
        for count, heads in ((rows, 8), (rows, 8), (keys, 2), (keys, 2))
    )
    forward, backward = _kernel(kernel, blocks, where)
    out, lse = forward(q, k, v)
    wider = lse + 0.5  # as if the queries had more keys than the block
    got = out, lse, *backward(grad, q, k, v, out, wider)
    want = (
        *block_kernels.by_runs(block_kernels.reference_forward, blocks, _SCALE, (q,), (k, v)),
        *block_kernels.by_runs(block_kernels.reference_backward, blocks, _SCALE, (grad, q), (k, v), (out, wider)),
    )
    return max(_worst(one, other) for one, other in zip(got, want, strict=True))


def _kernel(kernel: Attention, blocks: Blocks, where: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of rows."""
    if kernel is Attention.CPU_FLASH:
        return (
            lambda q, k, v: block_kernels.by_runs(block_kernels.cpu_forward, blocks, _SCALE, (q,), (k, v)),
            lambda grad, q, k, v, out, lse: block_kernels.by_runs(
                block_kernels.cpu_backward, blocks, _SCALE, (grad, q), (k, v), (out, lse)
            ),
        )
    forward, backward = flash.KERNELS[kernel]
    each = torch.tensor([run[1:] for run in blocks.runs for _ in range(run[0])])
    ends = torch.cat([torch.zeros(1, 2, dtype=torch.int64), each.cumsum(0)]).int().to(where)
    settings = (ends[:, 0].contiguous(), ends[:, 1].contiguous()), blocks.longest, blocks.causal, _SCALE

    def rows_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, *settings)
        return out, lse.t()

    def rows_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        return backward(grad, q, k, v, out, lse.t().contiguous(), *settings)

    return rows_forward, rows_backward


def _worst(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())
