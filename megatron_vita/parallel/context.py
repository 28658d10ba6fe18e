"""Per-forward metadata of the attention layers: layout, block schedule, rotary table, use of the key/value cache.

VitaModel builds one PackedSeqContext per packed sequence; VitaCoreAttention reads it. Legend: t tokens of this rank, d
head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.kv_cache import CacheStep
from megatron_vita.parallel.schedule import Schedule, build_schedule


@dataclass
class PackedSeqContext(PackedSeqParams):
    """The packed sequence of one forward pass, passed as megatron-core's `packed_seq_params`.

    `qkv_format` is `sbhd`: megatron-core then treats the packed sequence as one sequence of batch size 1, [s/cp, 1, h],
    and leaves document masking and rotary embedding to VitaCoreAttention.
    """

    qkv_format: str = "sbhd"
    layout: SequenceLayout | None = None
    """Documents of the packed sequence and their partition over ranks; None in a step that only decodes."""
    cp_rank: int = 0
    """This rank in the context-parallel group."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the local tokens' position ids, [t, 1, d / 2] each; None: no rotary embedding."""
    step: CacheStep | None = None
    """Use of the key/value cache in generation; None in training."""
    schedules: dict[str, Schedule] = field(default_factory=dict, repr=False)
    """This rank's block schedule by cp_comm_type, as far as it is built."""

    def schedule(self, device: torch.device, comm_type: str = "all_gather") -> Schedule:
        """This rank's block schedule; if it is not given, built for the first layer and cached for the others."""
        if comm_type not in self.schedules:
            assert self.layout is not None, "a PackedSeqContext needs a layout"
            self.schedules[comm_type] = build_schedule(self.layout, self.cp_rank, device, comm_type)
        return self.schedules[comm_type]
