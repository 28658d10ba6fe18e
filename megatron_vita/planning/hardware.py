"""Published figures of GPUs and their links, and what a plan assumes of how much of them is reached."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.errors import ConfigError

USABLE = 0.9
"""Fraction of a GPU's memory that a step may fill: the rest is CUDA's context, NCCL, workspaces, fragmentation."""
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One GPU in a node of its maker's reference design. Bandwidths are one direction."""

    name: str
    bf16: float
    """Dense bfloat16 FLOP/s of the tensor cores."""
    memory_gib: float
    """Memory in GiB."""
    memory_bandwidth: float
    """Bytes a second."""
    nvlink: float
    """Bytes a second and GPU to the other GPUs of the node."""
    network: float
    """Bytes a second and GPU to other nodes."""
    gpus_per_node: int = 8


# Figures with sparsity are halved, and bandwidths of both directions together too.
HARDWARE: dict[str, Hardware] = {
    # NVIDIA A100 Tensor Core GPU datasheet (2020, 2021): 312 TFLOP/s; 1,555 and 2,039 GB/s; NVLink 600 GB/s.
    # NVIDIA DGX A100 datasheet: a 200 Gb/s ConnectX-6 a GPU.
    "A100-40": Hardware(
        name="A100-40", bf16=312 * _TERA, memory_gib=40, memory_bandwidth=1555 * _GIGA, nvlink=300 * _GIGA,
        network=25 * _GIGA,
    ),
    "A100-80": Hardware(
        name="A100-80", bf16=312 * _TERA, memory_gib=80, memory_bandwidth=2039 * _GIGA, nvlink=300 * _GIGA,
        network=25 * _GIGA,
    ),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM: 1,979 TFLOP/s with sparsity; 3.35 TB/s; NVLink 900 GB/s.
    # NVIDIA DGX H100 datasheet: a 400 Gb/s ConnectX-7 a GPU.
    "H100": Hardware(
        name="H100", bf16=989.5 * _TERA, memory_gib=80, memory_bandwidth=3350 * _GIGA, nvlink=450 * _GIGA,
        network=50 * _GIGA,
    ),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM: 141 GB, 4.8 TB/s, the rest as H100. DGX H200: a 400 Gb/s card a GPU.
    "H200": Hardware(
        name="H200", bf16=989.5 * _TERA, memory_gib=140, memory_bandwidth=4800 * _GIGA, nvlink=450 * _GIGA,
        network=50 * _GIGA,
    ),
    # H20: no public datasheet; 148 TFLOP/s, 96 GB, 4.0 TB/s and NVLink 900 GB/s as the press gave them in November 2023
    # (SemiAnalysis, "Nvidia's New China AI Chips Circumvent US Restrictions"). Network: assumed as HGX H100.
    "H20": Hardware(
        name="H20", bf16=148 * _TERA, memory_gib=96, memory_bandwidth=4000 * _GIGA, nvlink=450 * _GIGA,
        network=50 * _GIGA,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Fractions of the published figures that a step reaches. Assumptions, not measurements: set your own."""

    matrices: float = 0.7
    """Of the dense FLOP/s, in matrix products."""
    attention: float = 0.45
    """Of the dense FLOP/s, in flash attention, forward and backward together."""
    memory: float = 0.8
    """Of the memory bandwidth, in element-wise operations and the optimizer."""
    links: float = 0.75
    """Of NVLink and network, in collectives."""


def hardware_of(name: str) -> Hardware:
    """The table's entry, whatever the case of its name; `A100` is the one of 80 GB.

    Raises:
        ConfigError: it has none; names those it has.
    """
    wanted = {"A100": "A100-80"}.get(name.upper(), name.upper())
    if wanted not in HARDWARE:
        raise ConfigError(f"no figures are known of {name!r}. Choose one of {', '.join(HARDWARE)}.")
    return HARDWARE[wanted]
