"""Every fused piece against its plain twin. A piece that cannot run here says so; it does not pass.

The pieces that need a GPU or an optional package were never run where this was written.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vita import device
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.norms import RMSNorm
from megatron_vita.parallel import kernel_parity
from megatron_vita.parallel.rotary import rotate

_CLOSE, _HALF = 1e-5, 2e-2
"""Allowed in float32, and in bfloat16; relative to the largest value."""
_EPS, _WIDTH = 1e-6, 128


@dataclass(frozen=True)
class Piece:
    """A fused piece and what became of it."""

    name: str
    difference: float | None
    """Largest difference of output and gradients from the plain twin's, relative to the largest; none: not run."""
    allowed: float
    why_not: str = ""
    """Why it was not run."""

    @property
    def broken(self) -> bool:
        """It ran and differs."""
        return self.difference is not None and not self.difference <= self.allowed

    def __str__(self) -> str:
        """A line of the report."""
        if self.difference is None:
            return f"{self.name:44} {self.why_not}"
        verdict = "FAILED, differs by" if self.broken else "ok,"
        return f"{self.name:44} {verdict} {self.difference:.0e} (allowed {self.allowed:.0e})"


def check_pieces() -> Iterator[Piece]:
    """Run what can run here. Starts CUDA where there is any: fork no ranks afterwards."""
    yield Piece("RMSNorm, ours", _norm(), _CLOSE)
    yield Piece("SwiGLU, ours", _swiglu(), _CLOSE)
    yield Piece("rotary embedding, ours", _rotary(), _CLOSE)
    for name in kernel_parity.KERNELS:
        result = kernel_parity.parity(name)
        allowed = _CLOSE if name == kernel_parity.CPU_KERNEL else _HALF
        difference, why_not = (None, result) if isinstance(result, str) else (result, "")
        yield Piece(f"block attention, {name}", difference, allowed, why_not)
    yield _optional("RMSNorm, Transformer Engine", "transformer_engine.pytorch", _te_norm, _HALF)
    yield _optional("norm and linear, Transformer Engine", "transformer_engine.pytorch", _te_linear, _HALF)
    yield _optional("FusedAdam, Transformer Engine", "transformer_engine.pytorch.optimizers", _fused_adam, _CLOSE)
    yield _optional("FusedAdam, apex", "apex.optimizers", _fused_adam, _CLOSE)
    yield _optional("gradient accumulation, apex", "fused_weight_gradient_mlp_cuda", _accumulation, _HALF)


def _optional(name: str, module: str, check: Callable[[Any], float], allowed: float) -> Piece:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return Piece(name, None, allowed, "not installed")
    if not device.has_accelerator():
        return Piece(name, None, allowed, "not run: needs a GPU")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        return Piece(name, None, allowed, f"not installed: {error}")
    return Piece(name, check(loaded), allowed)


def _norm() -> float:
    class Settings:
        params_dtype = torch.float32
        sequence_parallel = False

    norm = RMSNorm(Settings, _WIDTH, _EPS).to(device.torch_device())
    x, weight = _draw(torch.float32, (40, _WIDTH), (_WIDTH,))
    with torch.no_grad():
        norm.weight.copy_(weight)
    ours = lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))  # noqa: E731
    return _compare(ours, lambda x, weight: F.rms_norm(x, (_WIDTH,), weight, _EPS), x, weight)


def _swiglu() -> float:
    (x,) = _draw(torch.float32, (40, 2 * _WIDTH))
    return _compare(SwiGLU(None), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], x)


def _rotary() -> float:
    x, angles = _draw(torch.float32, (40, 4, 32), (40, 1, 16))
    table = angles.detach().cos(), angles.detach().sin()

    def plain(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, -1)) * torch.complex(*table)
        return torch.cat([turned.real, turned.imag], -1)

    return _compare(lambda x: rotate(x, table), plain, x)


def _te_norm(engine: Any) -> float:
    x, weight = _draw(torch.bfloat16, (64, _WIDTH), (_WIDTH,))
    norm = engine.RMSNorm(_WIDTH, eps=_EPS, params_dtype=torch.bfloat16, device=x.device)
    ours = lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))  # noqa: E731
    return _compare(ours, lambda x, weight: F.rms_norm(x, (_WIDTH,), weight, _EPS), x, weight)


def _te_linear(engine: Any) -> float:
    x, scale, weight = _draw(torch.bfloat16, (64, _WIDTH), (_WIDTH,), (2 * _WIDTH, _WIDTH))
    settings = {"normalization": "RMSNorm", "bias": False, "params_dtype": torch.bfloat16, "device": x.device}
    linear = engine.LayerNormLinear(_WIDTH, 2 * _WIDTH, eps=_EPS, **settings)

    def ours(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(linear, {"layer_norm_weight": scale, "weight": weight}, (x,))
        return out

    return _compare(
        ours, lambda x, scale, weight: F.linear(F.rms_norm(x, (_WIDTH,), scale, _EPS), weight), x, scale, weight
    )


def _fused_adam(optimizers: Any) -> float:
    start, grad = (one.detach() for one in _draw(torch.float32, (_WIDTH, 8), (_WIDTH, 8)))
    results = []
    for kind in (optimizers.FusedAdam, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = grad.clone()
        kind([weight], lr=1e-2, weight_decay=0.1).step()
        results.append(weight.detach() - start)
    return _worst(*results)


def _accumulation(extension: Any) -> float:
    x, grad = (one.detach() for one in _draw(torch.bfloat16, (64, _WIDTH), (64, _WIDTH)))
    fused = torch.ones(_WIDTH, _WIDTH, device=x.device)
    plain = fused + grad.float().t() @ x.float()
    extension.wgrad_gemm_accum_fp32(x, grad, fused)
    return _worst(fused, plain)


def _draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(5)
    place = device.torch_device()
    return [torch.randn(shape, generator=source).to(place, dtype).requires_grad_() for shape in shapes]


def _compare(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Output, and gradients of all inputs for one random gradient of the output."""
    results = []
    for function in (fused, plain):
        out = function(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.device, out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    return max(_worst(one, other) for one, other in zip(*results, strict=True))


def _worst(one: Tensor, other: Tensor) -> float:
    difference = (one.detach().double() - other.detach().double()).abs().max()
    return float(difference / other.detach().double().abs().max())
