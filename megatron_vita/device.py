"""CUDA or CPU: the one module that knows, and everything that megatron-core 0.16.1 needs to run without CUDA.

megatron-core asks CUDA by name in some forty places. Where there is no CUDA, `install` gives each of those questions a
CPU answer; where there is, it does nothing. Every line of it says who asks. No other file of the package names a device
or a communication backend.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_installed = False


def has_accelerator() -> bool:
    """True where CUDA is usable."""
    return torch.cuda.is_available()


def num_accelerators() -> int:
    """GPUs that this process sees; 0 without CUDA. CUDA is not started by it, so processes may be forked afterwards."""
    return torch.cuda.device_count()


def torch_device() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else _CPU


def on_accelerator(what: torch.Tensor | torch.device) -> bool:
    """A tensor lies on a GPU, or a device is one. (Tests let "meta" stand for it.)"""
    return (what.device if isinstance(what, torch.Tensor) else what).type != "cpu"


def backend() -> str:
    """The communication backend for tensors on `torch_device()`."""
    return "nccl" if has_accelerator() else "gloo"


def bind_rank(local_rank: int) -> None:
    """Give this process its device, before any group exists: one GPU per local rank; nothing to do on CPU."""
    if has_accelerator():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def prepare_network(*, single_node: bool) -> None:
    """Safe defaults for the communication backend, set only where the user has set nothing.

    gloo looks its own host name up; containers and laptops often have one that does not resolve, or resolves to an
    interface that is down. Ranks of one machine need nothing but the loopback.
    """
    if single_node and not has_accelerator() and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def empty_cache() -> None:
    """Return cached memory to the device; nothing to do on CPU."""
    if has_accelerator():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait until the device has done what was queued; CPU work is done when the call returns."""
    if has_accelerator():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Most memory this process has held: allocated on the GPU, or resident on CPU. Bytes."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def seed_all(seed: int, *, tp_rank: int = 0) -> None:
    """Seed torch and megatron-core's tracker, whose state differs by tensor-parallel rank.

    Sequence parallelism forks the tracker even with dropout 0, so it must be seeded before any forward.

    Args:
        seed: the same on all ranks of one tensor-parallel group.
        tp_rank: shifts the stream of the tracker only.
    """
    install()
    from megatron.core.tensor_parallel import random as megatron_random

    torch.manual_seed(seed)
    megatron_random.model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)


def install() -> None:
    """Make megatron-core run on CPU and gloo; with CUDA only quiet its import warnings. Idempotent.

    Call before anything of megatron-core is built (importing it earlier is fine). A forked child inherits the result,
    a spawned one does not.
    """
    global _installed
    if _installed:
        return
    _installed = True
    if not has_accelerator():
        _redirect_factories()
        _redirect_device_queries()
        _redirect_rng()


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_factories() -> None:
    """Tensors created with device="cuda" are created on CPU, and nothing is pinned.

    Asked by: optimizer/optimizer.py (found_inf, scale), optimizer/clip_grads.py (norms), pipeline_parallel/schedules.py
    (token counts), dist_checkpointing/exchange_utils.py, transformer/utils.py, tensor_parallel/data.py; pin_memory by
    models/common/embeddings/rope_utils.py under context parallelism.
    """

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs:
                if _is_cuda(kwargs.get("device")):
                    kwargs["device"] = _CPU
                kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapped

    # torch lists its factories once, at first use, for `with torch.device(...)`. Listed after they are replaced, they
    # would not be recognised, and whoever builds a model on "meta" (transformers does) would get unfilled memory.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _redirect_device_queries() -> None:
    """Questions about the current device, moves to it, and waits for it."""
    # distributed/param_and_grad_buffer.py, tensor_parallel/{layers,mappings}.py, p2p_communication.py,
    # distrib_optimizer.py, dist_checkpointing/strategies: "where do I allocate?"
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # p2p_communication.py after a batched exchange, dist_checkpointing's writers: gloo work is done when waited for.
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # distrib_optimizer.py and exchange_utils.py when saving or loading, language_module.py with tied embeddings.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    plain_type = torch.Tensor.type

    def type_as_megatron_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # optimizer/{clip_grads,optimizer,distrib_optimizer}.py compare with "torch.cuda.FloatTensor". Only
        # megatron-core is answered so: anybody else asks in earnest.
        out = plain_type(self, *args, **kwargs)
        if isinstance(out, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return out.replace("torch.", "torch.cuda.", 1)
        return out

    torch.Tensor.type = type_as_megatron_expects  # type: ignore[method-assign,assignment]


class _ExpectedRngNoise(logging.Filter):
    """Drops "CPU RNG state changed within GPU RNG context": without a GPU the tracker works on the CPU generator and
    restores it, so every fork that draws numbers would log it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def _redirect_rng() -> None:
    """megatron-core's RNG tracker runs on the CPU generator."""
    # tensor_parallel/random.py, CudaRNGStatesTracker.add: torch's CPU build would queue the seed for a CUDA that never
    # comes, and the tracker's states would in silence be neither seeded nor distinct per tensor-parallel rank.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    from megatron.core.tensor_parallel import random as megatron_random

    # fork() of the tracker and activation recomputation save and restore through these two.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(_ExpectedRngNoise())


# ---- loading a distributed optimizer whose inner optimizer is torch's AdamW (no Transformer Engine, no Apex) ----


def _plain_distributed_optimizers(optimizer: Any) -> Iterator[Any]:
    """The DistributedOptimizers inside a (chained) optimizer that step with torch's own Adam."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    chained: Iterable[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    for one in chained:
        if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield one


def prepare_optimizer_for_load(optimizer: Any) -> None:
    """Let a distributed optimizer build the state dict that a checkpoint is read into. Call before asking for it.

    Two defects of megatron-core 0.16.1 with torch's AdamW: `state_dict` asserts on an optimizer without state
    (distrib_optimizer.py:642): one that never stepped, or that has nothing to train on this rank (a pipeline stage
    whose layers are all frozen). And the setter copies every entry of the state, `step` among them, which the
    checkpoint does not hold per parameter, and copies without no_grad (:938-940). Such an optimizer can only be saved
    after this call too.
    """
    for one in _plain_distributed_optimizers(optimizer):
        if not one.optimizer.state:
            _give_first_state(one.optimizer)
        if not one.optimizer.state:
            one.state_dict = functools.partial(_state_dict_of_nothing, one)
        one._set_main_param_and_optimizer_states = functools.partial(_set_states_without_step, one)


def _give_first_state(adam: torch.optim.Optimizer) -> None:
    """What AdamW holds before its first step. (megatron-core's own way is a step without gradients, which is counted
    and lets weight decay move the weights.)"""
    for group in adam.param_groups:
        for one in group["params"]:
            if one.numel():
                moments = {name: torch.zeros_like(one) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[one] = {"step": torch.tensor(0.0), **moments}


def _state_dict_of_nothing(optimizer: Any) -> dict[str, Any]:
    """DistributedOptimizer.state_dict for a rank without a parameter; what is saved of it comes from rank 0."""
    groups = optimizer.optimizer.state_dict()["param_groups"]
    kept = [{key: value for key, value in group.items() if key != "params"} | {"step": 0.0} for group in groups]
    return {"optimizer": {"param_groups": kept}}


def fix_optimizer_after_load(optimizer: Any) -> None:
    """Give every parameter a `step` of its own again. Call right after `load_state_dict`.

    megatron-core 0.16.1 loads one shared tensor into all of them (distrib_optimizer.py:818-824), and AdamW then
    advances it once per parameter: wrong bias correction, without any error.
    """
    for one in _plain_distributed_optimizers(optimizer):
        for state in one.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


@torch.no_grad()
def _set_states_without_step(optimizer: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, order = optimizer.model_param_group_index_map[model_param]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    for key, target in {"param": main, **optimizer.optimizer.state[main]}.items():
        if key != "step":
            target.copy_(tensors[key])
