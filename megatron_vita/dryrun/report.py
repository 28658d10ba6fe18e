"""What a dry run of one rank found; JSON both ways."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Collective:
    """Calls of one collective in one process group."""

    kind: str
    group: str
    """Name of the process group: tp, cp, dp, dp_cp, pp, tp_cp, world."""
    ranks: int
    """Size of the group."""
    phase: str
    """`micro-batches`, `gradients` or `optimizer`."""
    calls: int
    nbytes: int
    """Bytes of the larger of input and output, summed over the calls."""


@dataclass(frozen=True, slots=True)
class HostSync:
    """Places where the host waits for the device."""

    what: str
    line: str
    """File and line that asked."""
    phase: str
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A dry run of one rank. Bytes, of the last step; before and after it if not said otherwise."""

    stage: str
    world_size: int
    rank: int
    kind: str = ""
    """What kind of rank it is: coordinates by name."""
    error: str | None = None
    """What a GPU would refuse, and where; the other fields are then empty."""
    parameters: int = 0
    """Parameters of this rank."""
    trainable: int = 0
    documents: int = 0
    """Documents of the longest row."""
    tiles: int = 0
    """Tiles that this rank encodes in the row with the most."""
    labelled: int = 0
    """Labelled tokens of this rank in one row."""
    micro_batches: int = 0
    """Micro-batches that were run."""
    micro_batches_in_step: int = 0
    """Micro-batches of a rank in a step of the recipe; those run use as much memory."""
    build_peak: int = 0
    """Peak while model and optimizer were built."""
    before: dict[str, int] = field(default_factory=dict)
    """Live bytes before the step, by part."""
    peak: dict[str, int] = field(default_factory=dict)
    """Live bytes at the peak, by part: weights, gradients, optimizer, kept activations, working set, tiles, head."""
    after: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    peak_module: str = ""
    """Path of the module that ran at the peak."""
    peak_operation: str = ""
    peak_in_backward: bool = False
    flops: int = 0
    """FLOPs of this rank in the micro-batches run; a multiply-add counts as two."""
    collectives: list[Collective] = field(default_factory=list)
    host_syncs: list[HostSync] = field(default_factory=list)
    operations: int = 0
    """Operations that PyTorch dispatched, an upper bound of kernel launches."""
    attention_calls: int = 0
    """Calls of attention kernels on blocks."""
    kernels: list[str] = field(default_factory=list)
    """Lines of the table of kernels: what a GPU would compute with what, given the packages of this machine."""
    measured: dict[str, float] = field(default_factory=dict)
    """Of a real run: `before`, `peak` and `after` in bytes by PyTorch's allocator, `reserved` bytes, `step_seconds`."""
    seconds: float = 0.0
    """Time that the dry run itself took."""

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        """The inverse of `to_json`."""
        lists = {
            "collectives": [Collective(**one) for one in content["collectives"]],
            "host_syncs": [HostSync(**one) for one in content["host_syncs"]],
        }
        return cls(**{**content, **lists})
