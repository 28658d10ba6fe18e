"""Python's torch.cuda, answered by constants: what the program asks of a GPU while tensors are fake.

Installed once in the dry run's own process, before megatron-core is imported; no other process is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types

from megatron_vita.dryrun.mode import fused

DEVICE = torch.device("cuda", 0)
GPUS_A_NODE = 8
CAPABILITY = (9, 0)
"""Compute capability of Hopper: kernels for it are chosen."""
MULTIPROCESSORS = 132
_RNG_STATE_BYTES = 16
_ATEN = torch.library.Library("aten", "IMPL")
"""Registrations last as long as it does."""


class _Stream:
    """A stream and an event at once: everything has happened, so nobody waits."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def query(self) -> bool:
        """True: done."""
        return True

    def wait(self, *_: Any, **__: Any) -> None:
        """Return at once."""

    record = synchronize = wait_stream = wait_event = wait

    def record_event(self, *_: Any) -> _Stream:
        """An event that has happened."""
        return self


def install(memory_bytes: int) -> None:
    """Replace the functions of torch.cuda, and three of torch that cannot handle fake CUDA tensors.

    Args:
        memory_bytes: memory of the GPU that torch.cuda reports.
    """
    properties = SimpleNamespace(
        name="dry run", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=memory_bytes,
        multi_processor_count=MULTIPROCESSORS,
    )  # fmt: skip
    state = torch.zeros(_RNG_STATE_BYTES, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": GPUS_A_NODE,
        "current_device": DEVICE.index,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_rng_state": state,
        "mem_get_info": (memory_bytes, memory_bytes),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "is_current_stream_capturing": False,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "set_rng_state", "init", "_lazy_init"):
        setattr(torch.cuda, name, _constant(None))
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, _Stream)
    for name in ("current_stream", "default_stream", "stream"):
        setattr(torch.cuda, name, lambda *_, **__: _Stream())
    # is_available() says yes, so fake tensors would compute some constants on a device that is not there.
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    nn.Module._apply = _apply  # type: ignore[method-assign]
    _replace_type()
    torch.compile = _eager  # type: ignore[assignment]
    _set_rng_of_megatron()
    _register_rms_norm()
    # AdamW's foreach kernels, which it chooses for CUDA tensors, hold the root of the second moment of all of them.
    _foreach_supported_types.append(FakeTensor)
    _skip_the_first_reduction_of_tied_weights()


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _apply(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """nn.Module._apply by new parameters: torch's swaps tensors in place, which fake tensors do not allow."""
    for module in self.modules() if recurse else (self,):
        for name, old in module._parameters.items():
            if old is None:
                continue
            with torch.no_grad():
                new = nn.Parameter(fn(old.detach()), requires_grad=old.requires_grad)
            new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in new.__dict__})
            module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


def _replace_type() -> None:
    """`Tensor.type()` of a fake CUDA tensor says torch.cuda.FloatTensor, as megatron-core's optimizer compares."""
    plain = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        fake_cuda = isinstance(out, str) and self.device.type == DEVICE.type and ".cuda." not in out
        return out.replace("torch.", "torch.cuda.", 1) if fake_cuda else out

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]


def _eager(function: Any = None, **_: Any) -> Any:
    """torch.compile without compiling."""
    return fused if function is None else fused(function)


def _set_rng_of_megatron() -> None:
    """megatron-core's RNG tracker keeps and restores states of the device's generator."""
    from megatron.core.tensor_parallel import random

    state = torch.zeros(_RNG_STATE_BYTES, dtype=torch.uint8)
    random._get_cuda_rng_state = _constant(state)
    random._set_cuda_rng_state = _constant(None)


def _register_rms_norm() -> None:
    """Make RMSNorm one operation whose backward keeps its input, as in PyTorch's CUDA build.

    The CPU build has no kernel of it for CUDA and therefore decomposes it above autograd, which then keeps two tensors
    of the input's shape in float32.
    """

    def kernel(*_: Any) -> Any:
        raise AssertionError("fake tensors never reach a kernel")

    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        _ATEN.impl(name, kernel, "CUDA")


def _skip_the_first_reduction_of_tied_weights() -> None:
    """A tied embedding's copy on the last stage gets its values by `weight.data = ...; all_reduce`, once, when it is
    built: fake tensors have no values, and do not allow their storage to be swapped."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    LanguageModule._is_in_embd_group = lambda self: False
