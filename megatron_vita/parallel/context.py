"""What rides with a row through megatron-core's layers: its layout, its blocks and, when generating, its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vita.errors import ConfigError
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.schedule import Schedule, build_schedule


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Where a row's new tokens go in the cache and what they see: the same for every layer."""

    prefill: bool
    """Nothing is cached yet: the new tokens are all there is to see."""
    known: int
    """New tokens that belong to a sequence; those after them are padding."""
    needed: int
    """Tokens of the longest sequence, the new ones included."""
    sequence: Tensor
    """int64 [known]: the sequence of each new token."""
    position: Tensor
    """int64 [known]: its place in the sequence."""
    queries: Tensor
    """int64 [known]: its place when the new tokens of every sequence are padded to the longest run."""
    visible: Tensor
    """bool [sequences, longest run, needed]: which cached tokens each new one sees."""


class KVCache:
    """Keys and values of sequences that are being generated, for all layers.

    Document i of a row belongs to sequence i; documents beyond the last sequence are padding and leave no trace. Every
    layer appends; `advance`, once per forward pass, makes the new tokens part of the past.
    """

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        """Cached tokens of each sequence."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [sequences, capacity, g, d]

    def __len__(self) -> int:
        return len(self.lengths)

    def plan(self, documents: Sequence[int], device: torch.device) -> DecodePlan:
        """Deal a row's documents to the sequences.

        Raises:
            ConfigError: a sequence has no document.
        """
        if len(documents) < len(self):
            raise ConfigError(
                f"a row of {len(documents)} documents for {len(self)} cached sequences: document i continues sequence "
                "i, so give each sequence a document, or forget finished ones with KVCache.keep."
            )
        new = np.array(documents[: len(self)])
        have = np.array(self.lengths)
        longest, needed = int(new.max()), int((have + new).max())
        sequence = np.repeat(np.arange(len(self)), new)
        offset = np.arange(int(new.sum())) - np.repeat(np.cumsum(new) - new, new)
        last_seen = have[:, None, None] + np.arange(longest)[None, :, None]
        visible = np.arange(needed)[None, None, :] <= last_seen
        arrays = (sequence, have[sequence] + offset, sequence * longest + offset, visible)
        return DecodePlan(not have.any(), int(new.sum()), needed, *(torch.from_numpy(one).to(device) for one in arrays))

    def append(self, layer: int, key: Tensor, value: Tensor, plan: DecodePlan) -> tuple[Tensor, Tensor]:
        """Add one row's keys and values behind what each sequence has.

        Args:
            layer: the layer's number.
            key: [t, g, d], the documents one after another.
            value: [t, g, d].
            plan: of the row.

        Returns:
            all keys and values of the layer, [sequences, needed, g, d]; what lies behind a sequence's end is zero.
        """
        keys, values = self._room(layer, key, plan.needed)
        keys[plan.sequence, plan.position] = key[: plan.known]
        values[plan.sequence, plan.position] = value[: plan.known]
        return keys[:, : plan.needed], values[:, : plan.needed]

    def advance(self, documents: Sequence[int]) -> None:
        """Count the tokens of a row, after its last layer."""
        self.lengths = [have + new for have, new in zip(self.lengths, documents, strict=False)]

    def keep(self, sequences: Sequence[int]) -> None:
        """Forget all but these sequences (indices into the current ones): the others are finished."""
        self.lengths = [self.lengths[one] for one in sequences]
        for layer, held in self._layers.items():
            index = torch.tensor(list(sequences), dtype=torch.int64, device=held[0].device)
            self._layers[layer] = held[0].index_select(0, index), held[1].index_select(0, index)

    def _room(self, layer: int, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < needed:
            capacity = -(-needed * 5 // 4 // 64) * 64  # grow by a quarter, so that appending costs little on average
            shape = (len(self), capacity, *like.shape[1:])
            grown = like.new_zeros(shape), like.new_zeros(shape)
            for old, new in zip(held or (), grown, strict=False):
                new[:, : old.shape[1]] = old
            held = self._layers[layer] = grown
        return held


@dataclass
class PackedSeqContext(PackedSeqParams):
    """The row that a forward pass sees, in the place where megatron-core carries packed-sequence settings.

    `qkv_format` is `sbhd`: megatron-core then treats the row as one ordinary sequence [s/cp, 1, h] and leaves documents
    and positions to our attention.
    """

    qkv_format: str = "sbhd"
    layout: SequenceLayout | None = None
    """Who owns which token."""
    cp_rank: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the local tokens' positions, [t, 1, d / 2]; none: no rotary embedding."""
    cache: KVCache | None = None
    """Past keys and values, when generating."""
    _schedules: dict[str, Schedule] = field(default_factory=dict, repr=False)
    _decoding: DecodePlan | None = field(default=None, repr=False)

    def schedule(self, device: torch.device, comm_type: str = "all_gather") -> Schedule:
        """This rank's blocks; built for the first layer, kept for the rest."""
        if comm_type not in self._schedules:
            assert self.layout is not None, "a PackedSeqContext needs a layout"
            self._schedules[comm_type] = build_schedule(self.layout, self.cp_rank, device, comm_type)
        return self._schedules[comm_type]

    def decoding(self, device: torch.device) -> DecodePlan:
        """How the row continues the cached sequences; built for the first layer, kept for the rest.

        Raises:
            ConfigError: context parallelism, or a sequence without a document.
        """
        if self._decoding is None:
            assert self.layout is not None, "a PackedSeqContext needs a layout"
            assert self.cache is not None, "a PackedSeqContext without a cache has nothing to decode"
            if self.layout.cp > 1:
                raise ConfigError(
                    f"generation with a cache runs at context_parallel_size 1, not {self.layout.cp}. Load the model "
                    "with parallel.context_parallel_size=1."
                )
            self._decoding = self.cache.plan(self.layout.documents, device)
        return self._decoding
