"""Device selection (CUDA or CPU), and the patches that megatron-core (0.16.1 to 0.19) needs to run without CUDA.

megatron-core calls torch.cuda directly in about forty places. Without CUDA, `install` replaces these calls by CPU
equivalents; with CUDA it does nothing. Each patch names the callers that need it. No other file of the package names a
device or a communication backend.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._device import _device_constructors

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_installed = False


def has_accelerator() -> bool:
    """True if a GPU is visible. Does not initialise CUDA (torch.cuda.is_available may), so the process may fork."""
    return num_accelerators() > 0


def num_accelerators() -> int:
    """Number of visible GPUs; 0 without CUDA. Does not initialise CUDA, so the process may fork afterwards."""
    return torch.cuda.device_count()


def torch_device() -> torch.device:
    """This rank's device: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else _CPU


def on_accelerator(what: torch.Tensor | torch.device) -> bool:
    """True if a tensor is on a GPU, or a device is one; any device but the CPU counts (tests use `meta` for a GPU)."""
    return (what.device if isinstance(what, torch.Tensor) else what).type != "cpu"


def is_host_memory(tensor: torch.Tensor) -> bool:
    """True if the CPU can write into a tensor's memory, as reading a file does."""
    return not on_accelerator(tensor)


def host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised host memory of a tensor's shape and dtype; pinned if the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_accelerator(tensor))


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of this rank's GPU; None without CUDA. Initialises CUDA."""
    return torch.cuda.get_device_capability() if has_accelerator() else None


def default_group_is_of_the_host() -> bool:
    """True if collectives of the default process group take tensors on the CPU."""
    return backend() == "gloo"


def backend() -> str:
    """The communication backend for tensors on `torch_device()`."""
    return "nccl" if has_accelerator() else "gloo"


def host_group() -> torch.distributed.ProcessGroup | None:
    """The process group of all ranks for small tensors on the CPU, whose collectives do not make the host wait for the
    GPU: the world without CUDA, else a group that the first call creates. All ranks call it."""
    return _host_group(torch.distributed.group.WORLD) if has_accelerator() else None


@functools.lru_cache(maxsize=1)
def _host_group(_: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    return new_host_group()


def new_host_group() -> torch.distributed.ProcessGroup:
    """A process group of all ranks for tensors on the CPU. All ranks call it."""
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo")
    return group


def bind_rank(local_rank: int) -> None:
    """Select the GPU of this local rank, before any process group is created; no effect without CUDA."""
    if has_accelerator():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def prepare_network(*, single_node: bool) -> None:
    """Set GLOO_SOCKET_IFNAME=lo for ranks of one Linux machine without CUDA, unless the user has set it.

    gloo resolves its own host name, which on containers and laptops often fails or gives an interface that is down.
    """
    if single_node and not has_accelerator() and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def is_lost_rank(error: BaseException) -> bool:
    """True if a collective failed because another process ended or no longer answers.

    gloo has no class for it: the words are those of its TCP transport.
    """
    if isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError):
        return True
    words = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised host memory from which a GPU copies while the host goes on (`non_blocking=True`); ordinary memory
    without CUDA. torch uses a buffer again only after the copies from it are done."""
    return torch.empty(shape, dtype=dtype, pin_memory=has_accelerator())


def empty_cache() -> None:
    """torch.cuda.empty_cache; no effect without CUDA."""
    if has_accelerator():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """torch.cuda.synchronize; no effect without CUDA."""
    if has_accelerator():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: allocated by torch on the GPU, or resident set size without CUDA."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def free_memory_bytes() -> int:
    """Bytes that this rank may still allocate: free on its GPU, or its share of what the machine has available."""
    if has_accelerator():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def seed_all(seed: int, *, tp_rank: int = 0) -> None:
    """Seed torch and megatron-core's RNG tracker; call it before the first forward.

    Sequence parallelism forks the tracker even without dropout, which fails if it has not been seeded.

    Args:
        seed: the same on all ranks of a tensor-parallel group.
        tp_rank: tensor-parallel rank, which makes the tracker's state (not torch's) different per rank.
    """
    install()
    from megatron.core.tensor_parallel import random as megatron_random

    torch.manual_seed(seed)
    megatron_random.model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)


def install() -> None:
    """Patch torch and megatron-core so that megatron-core runs on CPU and gloo; no effect with CUDA. Idempotent.

    Call it before building any megatron-core object (importing megatron-core earlier is fine). Forked processes inherit
    the patches, spawned ones do not.
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
    """Make factory functions create device="cuda" tensors on the CPU, and ignore pin_memory.

    Callers: optimizer/optimizer.py (found_inf, scale), optimizer/clip_grads.py (norms), pipeline_parallel/schedules.py
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

    # torch caches the list of its factories at first use of `with torch.device(...)`: it must be cached before they are
    # replaced, else models built on "meta" (as transformers does) would be allocated, uninitialised.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _redirect_device_queries() -> None:
    """Patch queries of the current device, transfers to it, and synchronisation."""
    # Device of new buffers: distributed/param_and_grad_buffer.py, tensor_parallel/{layers,mappings}.py,
    # p2p_communication.py, distrib_optimizer.py, dist_checkpointing/strategies.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # p2p_communication.py after batched p2p: gloo operations are complete after wait().
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # param_and_grad_buffer.py (0.19) before each reduction of gradients: it waits for events of CUDA graphs.
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment]
    # distrib_optimizer.py and exchange_utils.py when saving or loading, language_module.py with tied embeddings.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    plain_type = torch.Tensor.type

    def type_as_megatron_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # optimizer/{clip_grads,optimizer,distrib_optimizer}.py compare with "torch.cuda.FloatTensor". Other callers
        # get the true type.
        out = plain_type(self, *args, **kwargs)
        if isinstance(out, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return out.replace("torch.", "torch.cuda.", 1)
        return out

    torch.Tensor.type = type_as_megatron_expects  # type: ignore[method-assign,assignment]


class _NoStream:
    """The current CUDA stream on the CPU: whatever was called is done, so there is nothing to wait for."""

    def wait_stream(self, *_: Any) -> None: ...

    synchronize = wait_event = record_event = wait_stream


class _ExpectedRngNoise(logging.Filter):
    """Drops "CPU RNG state changed within GPU RNG context": without a GPU the tracker uses the CPU generator, so every
    fork that draws random numbers would log it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def _redirect_rng() -> None:
    """Make megatron-core's RNG tracker use the CPU generator."""
    # tensor_parallel/random.py, CudaRNGStatesTracker.add: torch's CPU build queues torch.cuda.manual_seed until CUDA is
    # initialised, so without any error the tracker's states would be neither seeded nor different per tensor rank.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    from megatron.core.tensor_parallel import random as megatron_random

    # Used by the tracker's fork() and by activation recomputation to save and restore the state.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(_ExpectedRngNoise())
