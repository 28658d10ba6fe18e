"""Compare every fused kernel with its reference implementation. A kernel that cannot run here is reported, not passed.

Kernels of optional packages are checked in checks/fused.py, attention kernels in checks/kernels.py; those that run
everywhere are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vita import device
from megatron_vita.checks import fused, kernels
from megatron_vita.kernels import Attention
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.norms import RMSNorm
from megatron_vita.parallel.rotary import rotate

_CLOSE, _HALF = 1e-5, 2e-2
"""Allowed in float32, and in bfloat16; relative to the largest value."""
_EPS, _WIDTH = 1e-6, 128


@dataclass(frozen=True)
class KernelCheck:
    """A fused kernel and the result of its check."""

    name: str
    verdict: str
    """`ok`, with the difference where one was measured; `not installed`; or what is wrong."""

    @property
    def broken(self) -> bool:
        """The kernel ran and differs from its reference."""
        return not self.verdict.startswith((fused.OK, fused.NOT_INSTALLED))

    def __str__(self) -> str:
        """A line of the report."""
        return f"{self.name:40} {'FAILED ' if self.broken else ''}{self.verdict}"


def check_kernels() -> Iterator[KernelCheck]:
    """Run every check that this machine supports. It may initialise CUDA: fork no ranks afterwards."""
    yield KernelCheck("RMSNorm (ours)", _verdict(_norm(), _CLOSE))
    yield KernelCheck("SwiGLU (ours)", _verdict(_swiglu(), _CLOSE))
    yield KernelCheck("rotary embedding (ours)", _verdict(_rotary(), _CLOSE))
    yield KernelCheck("rotary embedding (GLM-4's, ours)", _verdict(_rotary(32, interleaved=True), _CLOSE))
    for kernel in kernels.KERNELS:
        allowed = _CLOSE if kernel is Attention.CPU_FLASH else _HALF
        yield KernelCheck(f"block attention ({kernel.value})", _verdict(kernels.parity(kernel), allowed))
    for name, check in fused.checks():
        yield KernelCheck(name, check())


def _verdict(difference: float | str, allowed: float) -> str:
    if isinstance(difference, str):
        return difference
    if difference <= allowed:
        return f"{fused.OK}, {difference:.0e} (allowed {allowed:.0e})"
    return f"differs by {difference:.0e}, allowed {allowed:.0e}"


def _norm() -> float:
    settings = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    norm = RMSNorm(settings, _WIDTH, _EPS).to(device.torch_device())
    x, weight = _draw((40, _WIDTH), (_WIDTH,))

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return out

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight

    return _compare(kernel, reference, x, weight)


def _swiglu() -> float:
    (x,) = _draw((40, 2 * _WIDTH))
    return _compare(SwiGLU(None), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], x)


def _rotary(rest: int = 0, *, interleaved: bool = False) -> float:
    """Check a rotary embedding of 32 elements of each head, followed by `rest` elements that it does not rotate."""
    x, angles = _draw((40, 4, 32 + rest), (40, 1, 16))
    table = angles.detach().cos(), angles.detach().sin()

    def reference(x: Tensor) -> Tensor:
        x, kept = x[..., :32], x[..., 32:]
        pairs = x.unflatten(-1, (16, 2)) if interleaved else x.unflatten(-1, (2, 16)).transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(*table))
        return torch.cat([(turned if interleaved else turned.transpose(-1, -2)).flatten(-2), kept], -1)

    return _compare(lambda x: rotate(x, table, interleaved=interleaved), reference, x)


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=source).to(device.torch_device()).requires_grad_() for shape in shapes]


def _compare(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Largest difference of output and gradients of all inputs, for one random gradient of the output."""
    results = []
    for function in (kernel, reference):
        out = function(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.device)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*results, strict=True))
