"""Compare the fused kernels of optional packages with their reference implementations.

Checked is what kernels.py chooses: apex's GEMM that accumulates gradients, Transformer Engine's or apex's FusedAdam,
Transformer Engine's norms and linears, megatron-core's compiled SwiGLU, PyTorch's RMSNorm kernel. Block attention has
its own checks in checks/kernels.py. Written without a GPU and these packages: none of the checks ever ran to `ok`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vita import device, kernels
from megatron_vita.models.activations import SwiGLU
from megatron_vita.models.norms import RMSNorm

NOT_INSTALLED = "not installed"
OK = "ok"
_BOUND = 2e-2
"""Largest difference in bfloat16, relative to the largest value; of float32 accumulations, a thousandth of it."""


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, check) of every fused kernel. A check returns `ok`, `not installed`, or what differs and by how much."""
    chosen = kernels.of_program()
    found: list[tuple[str, bool, Callable[[], str]]] = [
        ("gradient-accumulation GEMM (apex)", chosen.accumulating_gemm, _check_accumulation),
        ("FusedAdam (Transformer Engine or apex)", kernels.fused_adam() is not None, _check_adam),
        ("RMSNorm (Transformer Engine)", chosen.transformer_engine, _check_te_norm),
        ("norm and linear (Transformer Engine)", chosen.transformer_engine, _check_te_linear),
        ("SwiGLU (megatron-core, compiled)", chosen.compiled_swiglu, _check_swiglu),
        ("RMSNorm (PyTorch's kernel)", chosen.fused_norm, _check_torch_norm),
    ]
    return [(name, _guarded(used, check)) for name, used, check in found]


def _guarded(used: bool, check: Callable[[], str]) -> Callable[[], str]:
    def run() -> str:
        if not used:
            return NOT_INSTALLED
        try:
            return check()
        except Exception as error:  # a broken installation is a finding, and the next kernel is still checked
            return f"{type(error).__name__}: {error}"

    return run


def compare(pairs: dict[str, tuple[Tensor, Tensor]], bound: float = _BOUND) -> str:
    """`ok`, or the first tensor that differs by more than `bound`, relative to the reference's largest value.

    Args:
        pairs: name -> (fused, reference).
        bound: allowed difference.
    """
    for name, (fused, reference) in pairs.items():
        largest = reference.double().abs().max().clamp_min(1e-12)
        worst = float((fused.double() - reference.double()).abs().max() / largest)
        if not worst <= bound:
            return f"{name} differs by {worst:.1e}, allowed are {bound:.0e}"
    return OK


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device.torch_device(), dtype)


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, _random(*out.shape, dtype=out.dtype, seed=9))]


def _compare_functions(fused: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> str:
    one, other = _with_gradients(fused, *inputs), _with_gradients(reference, *(x.float() for x in inputs))
    names = ["output", *(f"gradient of input {number}" for number in range(len(inputs)))]
    return compare(dict(zip(names, zip(one, other, strict=True), strict=True)))


def _check_accumulation() -> str:
    apex = importlib.import_module("fused_weight_gradient_mlp_cuda")
    inputs, grad = _random(96, 64), _random(96, 128, seed=2)
    total = _random(128, 64, dtype=torch.float32, seed=3)
    want = total + grad.float().t() @ inputs.float()
    apex.wgrad_gemm_accum_fp32(inputs, grad, total)
    return compare({"gradient": (total, want)}, _BOUND / 1000)


def _check_adam() -> str:
    from megatron.core import optimizer

    stepped = []
    for kind in (optimizer.Adam, torch.optim.AdamW):
        weight = torch.nn.Parameter(_random(64, 32, dtype=torch.float32))
        adam = kind([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(3):
            weight.grad = _random(64, 32, dtype=torch.float32, seed=step + 2)
            adam.step()
        stepped.append(weight.detach())
    return compare({"weight after three steps": (stepped[0], stepped[1])}, _BOUND / 1000)


def _reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.cpu(), (x.shape[-1],), weight.cpu(), 1e-6).to(x.device)


def _check_te_norm() -> str:
    te = importlib.import_module("transformer_engine.pytorch")

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        norm = te.RMSNorm(64, eps=1e-6, params_dtype=x.dtype, device=x.device)
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    return _compare_functions(fused, _reference_norm, _random(96, 64), _random(64, seed=2))


def _check_te_linear() -> str:
    te = importlib.import_module("transformer_engine.pytorch")

    def fused(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        layer = te.LayerNormLinear(
            64, 128, eps=1e-6, bias=False, normalization="RMSNorm", params_dtype=x.dtype, device=x.device
        )
        return torch.func.functional_call(layer, {"layer_norm_weight": norm, "weight": weight}, (x,))

    def reference(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        return _reference_norm(x, norm) @ weight.t()

    return _compare_functions(fused, reference, _random(96, 64), _random(64, seed=2), _random(128, 64, seed=3))


def _check_swiglu() -> str:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return _compare_functions(lambda x: bias_swiglu_impl(x, None), SwiGLU(None), _random(96, 1, 128))


def _check_torch_norm() -> str:
    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        norm = RMSNorm(SimpleNamespace(params_dtype=x.dtype, sequence_parallel=False), 64, eps=1e-6).to(x.device)
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    return _compare_functions(kernel, _reference_norm, _random(96, 64), _random(64, seed=2))
