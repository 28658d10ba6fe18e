"""Which fused pieces of optional packages this process can use. (That they compute the same: checks/fused.py.)"""

from __future__ import annotations

import importlib.util

from megatron_vita import device


def accumulates_gradients() -> bool:
    """Weight gradients can be added straight into the float32 buffer by apex's GEMM; else autograd adds them."""
    return device.has_accelerator() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_transformer_engine() -> bool:
    """Transformer Engine is installed: the `te` layer specs can be built."""
    return importlib.util.find_spec("transformer_engine") is not None
