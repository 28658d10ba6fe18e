"""Which kernel computes what: one choice for each kind of device, which callers ask instead of the device.

Attention kernels, in the order of preference, where a tensor lies on a GPU in float16 or bfloat16:

    flash-attn 3       package flash_attn_interface, on GPUs of compute capability 9 (Hopper)
    flash-attn 2       package flash_attn, compute capability 8 and later
    PyTorch flash      the FlashAttention-2 that PyTorch ships, compute capability 8 and later

The reference kernels, which hold all scores of a block, compute what these do not: other dtypes, head sizes and GPUs.
`kernel_table` is what a run, the dry run and tools/check_parallel.py print. Every kernel named here has a parity check
in checks/. None of those for GPUs was ever run on one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from megatron_vita import device
from megatron_vita.config import StageConfig
from megatron_vita.errors import ConfigError

HALF = (torch.float16, torch.bfloat16)


class Attention(Enum):
    """A kernel for blocks of queries and keys; the value is its name in reports."""

    FLASH_ATTN_3 = "flash-attn 3, varlen"
    FLASH_ATTN_2 = "flash-attn 2, varlen"
    TORCH_FLASH = "PyTorch flash, varlen"
    CPU_FLASH = "PyTorch flash, CPU"
    REFERENCE = "reference, unfused"

    @property
    def variable_length(self) -> bool:
        """One call takes blocks of any shapes, by cu_seqlens; else a call takes blocks of one shape."""
        return self in (Attention.FLASH_ATTN_3, Attention.FLASH_ATTN_2, Attention.TORCH_FLASH)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes what on one kind of device."""

    half: Attention
    """Attention in float16 or bfloat16 with a head size that is a multiple of 8, up to 256."""
    other: Attention
    """Attention in other dtypes or with other head sizes."""
    fused_norm: bool
    """PyTorch's RMSNorm is one kernel; else models/norms.py computes it."""
    compiled_swiglu: bool
    """megatron-core's SwiGLU, compiled by torch; else models/activations.py computes it."""
    transformer_engine: bool
    """`model.transformer_impl: auto` takes Transformer Engine's layers."""
    accumulating_gemm: bool
    """apex's GEMM adds weight gradients to the float32 buffer; else PyTorch computes a gradient and adds it."""

    def attention(self, dtype: torch.dtype, head_dim: int) -> Attention:
        """The kernel for queries of a dtype and head size."""
        return self.half if dtype in HALF and head_dim % 8 == 0 and head_dim <= 256 else self.other

    @property
    def variable_length(self) -> bool:
        """Schedules for this device carry cu_seqlens and are not padded."""
        return self.half.variable_length

    def reads_pages(self, block_size: int, dtype: torch.dtype) -> bool:
        """Decoding reads the cache through block tables: FlashAttention-2 does for blocks of a multiple of 256."""
        return self.variable_length and dtype in HALF and block_size % 256 == 0


_ON_CPU = Kernels(Attention.CPU_FLASH, Attention.CPU_FLASH, False, False, False, False)


def on(place: torch.device) -> Kernels:
    """The choice for tensors on a device; any device but the CPU counts as a GPU (tests and dry runs have no other)."""
    return _on_gpu() if device.on_accelerator(place) else _ON_CPU


def of_program() -> Kernels:
    """The choice for `device.torch_device()`. Does not initialise CUDA on a machine without it."""
    return on(device.torch_device())


@functools.cache
def _on_gpu() -> Kernels:
    usable = [kernel for kernel in Attention if kernel.variable_length and why_not(kernel) is None]
    return Kernels(
        half=usable[0] if usable else Attention.REFERENCE,
        other=Attention.REFERENCE,
        fused_norm=True,
        compiled_swiglu=True,
        transformer_engine=installed("transformer_engine"),
        accumulating_gemm=installed("fused_weight_gradient_mlp_cuda"),
    )


def installed(package: str) -> bool:
    """A package can be found; it is not imported."""
    return importlib.util.find_spec(package) is not None


def why_not(kernel: Attention) -> str | None:
    """Why an attention kernel for GPUs is not used in half precision; None: it can be."""
    capability = device.compute_capability()
    needs = (9, 9) if kernel is Attention.FLASH_ATTN_3 else (8, 99)
    if capability is not None and not needs[0] <= capability[0] <= needs[1]:
        return f"compute capability {capability[0]}.{capability[1]}, needs {needs[0]}"
    return _missing(*_PACKAGES[kernel]) if kernel in _PACKAGES else None


def _missing(module: str, functions: Mapping[str, Sequence[str]]) -> str | None:
    """What a package lacks of the functions and arguments that parallel/flash.py uses, if anything.

    Releases of flash-attn 3 have neither a version to ask nor stable signatures: these are read, not assumed.
    """
    if not installed(module.split(".")[0]):
        return f"{module.split('.')[0]} is not installed"
    try:
        package = importlib.import_module(module)
    except (ImportError, OSError) as error:  # built for another PyTorch
        return f"{module} cannot be imported: {error}"
    for name, gives in functions.items():
        function = getattr(package, name, None)
        found = parameters(function) if function is not None else ()
        missing = [one for one in gives if not set(one.split("|")) & set(found)]
        if missing:
            return f"{module}.{name} has no {missing[0].replace('|', ' or ')}"
    return None


def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Parameter names of a function or a torch.library custom operator -> it has a default."""
    plain = getattr(function, "_init_fn", function)  # a custom operator's own signature is (*args, **kwargs)
    found = inspect.signature(plain).parameters
    return {name: one.default is not inspect.Parameter.empty for name, one in found.items()}


_INPUTS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_RESULTS = ("dout", "out", "softmax_lse", "dq", "dk", "dv")
_SWITCHES = ("dropout_p", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
_PACKAGES: dict[Attention, tuple[str, dict[str, Sequence[str]]]] = {
    Attention.FLASH_ATTN_3: (
        "flash_attn_interface",
        {
            "_flash_attn_forward": (*_INPUTS, "causal"),
            "_flash_attn_backward": (*_INPUTS, *_RESULTS, "causal|is_causal"),  # renamed in the latest
        },
    ),
    Attention.FLASH_ATTN_2: (
        "flash_attn.flash_attn_interface",
        {
            "_flash_attn_varlen_forward": (*_INPUTS, *_SWITCHES),  # before 2.7 other names
            "_flash_attn_varlen_backward": (*_INPUTS, *_RESULTS, *_SWITCHES, "deterministic"),
        },
    ),
}
"""Kernel -> its module, and the functions of it that parallel/flash.py calls with the arguments that they must take."""


class Row(NamedTuple):
    """A row of the table of kernels."""

    what: str
    used: str
    why: str

    def __str__(self) -> str:
        return f"{self.what:32} {self.used:37} {self.why}"


def choose_implementation(wanted: str) -> str:
    """Resolve model.transformer_impl (`auto`, `local` or `te`) to `local` or `te`: auto is te where it is installed and
    a GPU is visible.

    Raises:
        ConfigError: `te` is set, but Transformer Engine is not installed.
    """
    if wanted == "te" and not installed("transformer_engine"):
        raise ConfigError(
            "model.transformer_impl=te, but transformer_engine cannot be imported. Install the `cuda` extra, "
            "or use local."
        )
    return wanted if wanted != "auto" else "te" if of_program().transformer_engine else "local"


def fused_adam() -> str | None:
    """The package of the FusedAdam that megatron-core's optimizer takes on a GPU; None: PyTorch's AdamW."""
    from megatron.core import optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER or of_program() is _ON_CPU:
        return None
    return str(optimizer.Adam.__module__.split(".")[0])


def kernel_table(stage: StageConfig, dtype: torch.dtype | None = None) -> list[Row]:
    """What a stage is computed with on this machine, and why. Initialises CUDA where it is.

    Args:
        stage: the merged settings.
        dtype: of the parameters; by default the stage's.
    """
    chosen = of_program()
    gpu = chosen is not _ON_CPU
    wanted, head_dim = stage.model.transformer_impl, stage.model.head_dim
    te, adam = choose_implementation(wanted) == "te", fused_adam()
    dtype = dtype or (torch.bfloat16 if stage.train.bf16 else torch.float32)
    kernel = chosen.attention(dtype, head_dim)
    kind = f"{str(dtype).removeprefix('torch.')}, head size {head_dim}"
    better = [f"{one.value}: {why_not(one)}" for one in Attention if gpu and one.variable_length and why_not(one)]
    because = f"{kind}; not {'; not '.join(better)}" if better else kind
    paged = kernel.variable_length
    return [
        Row("layers", "Transformer Engine" if te else "megatron-core", f"transformer_impl {wanted}"),
        Row("attention of packed documents", kernel.value, because),
        Row("attention to the cache, prefill", kernel.value, kind),
        Row("attention to the cache, decode", "PyTorch flash, block tables" if paged else kernel.value,
            "blocks of 256 tokens or a multiple; else a call for each sequence" if paged else kind),
        Row("attention of the tower", "PyTorch, scaled_dot_product_attention", "PyTorch chooses"),
        Row("norms", "Transformer Engine" if te else "PyTorch RMSNorm" if chosen.fused_norm else "ours",
            "of the layers" if te else "one kernel" if chosen.fused_norm else "PyTorch's is not fused here"),
        Row("SwiGLU", "megatron-core, compiled" if chosen.compiled_swiglu else "ours" if not te else "PyTorch",
            "torch.compile" if chosen.compiled_swiglu else "torch.compile takes half a minute here"),
        Row("gradient accumulation", "apex, in the GEMM" if chosen.accumulating_gemm else "PyTorch, after the GEMM",
            _where(chosen.accumulating_gemm, gpu, "fused_weight_gradient_mlp_cuda")),
        Row("optimizer", f"{adam}'s FusedAdam" if adam else "PyTorch AdamW",
            _where(adam is not None, gpu, "Transformer Engine or apex")),
    ]  # fmt: skip


def _where(used: bool, gpu: bool, package: str) -> str:
    if used:
        return f"{package} is installed"
    return f"{package} is not installed" if gpu else "no GPU"
