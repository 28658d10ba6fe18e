"""Availability of fused kernels of optional packages; checks/fused.py compares them with reference implementations."""

from __future__ import annotations

import importlib.util

from megatron_vita import device


def accumulates_gradients() -> bool:
    """apex's fused weight-gradient GEMM is available: linear layers then accumulate gradients in the float32 buffer."""
    return device.has_accelerator() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_transformer_engine() -> bool:
    """Transformer Engine is installed: the `te` layer specs can be built."""
    return importlib.util.find_spec("transformer_engine") is not None
