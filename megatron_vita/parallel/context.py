"""Per-forward metadata of the attention layers: layout, block schedule, rotary table, KV cache.

VitaModel.forward builds one PackedSeqContext per packed sequence; VitaCoreAttention reads it. Legend: t tokens of this
rank, g key/value heads, d head size.
"""

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
    """Cache slots and attention mask of the new tokens of one forward pass; the same for every layer."""

    prefill: bool
    """The cache is empty: the new tokens attend to each other only."""
    num_new: int
    """New tokens that belong to a sequence; the tokens after them are padding."""
    max_length: int
    """Tokens of the longest sequence, new tokens included."""
    sequence: Tensor
    """int64 [num_new]: sequence of each new token."""
    position: Tensor
    """int64 [num_new]: position of each new token in its sequence."""
    padded_index: Tensor
    """int64 [num_new]: index of each new token in the flattened [sequences, max_new] batch, where max_new is the
    largest number of new tokens of a sequence."""
    mask: Tensor
    """bool [sequences, max_new, max_length]: True where a new token attends to a cached one."""


class KVCache:
    """Keys and values of all layers for a batch of sequences in generation.

    Document i of a packed sequence continues sequence i; documents beyond the last sequence are padding and are not
    stored. In each forward pass every layer calls `append`; VitaModel.forward calls `advance` once at its end. Works at
    context-parallel size 1; each tensor-parallel rank caches its own key/value heads.
    """

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        """Cached tokens of each sequence."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [sequences, capacity, g, d]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def plan(self, documents: Sequence[int], device: torch.device) -> DecodePlan:
        """Assign the documents of a packed sequence to the sequences of the cache; stores nothing.

        Args:
            documents: length of each document, as in SequenceLayout.
            device: of the plan's index tensors.

        Raises:
            ConfigError: fewer documents than sequences.
        """
        if len(documents) < len(self):
            raise ConfigError(
                f"a packed sequence of {len(documents)} documents for {len(self)} cached sequences: document i "
                "continues sequence i, so give each sequence a document, or forget finished ones with KVCache.keep."
            )
        new = np.array(documents[: len(self)])
        cached = np.array(self.lengths)
        max_new, max_length = int(new.max()), int((cached + new).max())
        sequence = np.repeat(np.arange(len(self)), new)
        offset = np.arange(int(new.sum())) - np.repeat(np.cumsum(new) - new, new)
        last_visible = cached[:, None, None] + np.arange(max_new)[None, :, None]
        mask = np.arange(max_length)[None, None, :] <= last_visible
        arrays = (sequence, cached[sequence] + offset, sequence * max_new + offset, mask)
        tensors = (torch.from_numpy(one).to(device) for one in arrays)
        return DecodePlan(not cached.any(), int(new.sum()), max_length, *tensors)

    def append(self, layer: int, key: Tensor, value: Tensor, plan: DecodePlan) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer behind the cached ones.

        Args:
            layer: megatron-core's layer number.
            key: [t, g, d], the documents concatenated.
            value: [t, g, d].
            plan: of this packed sequence.

        Returns:
            all keys and values of the layer, views [sequences, max_length, g, d]; zero beyond a sequence's end.
        """
        keys, values = self._buffers(layer, key, plan.max_length)
        keys[plan.sequence, plan.position] = key[: plan.num_new]
        values[plan.sequence, plan.position] = value[: plan.num_new]
        return keys[:, : plan.max_length], values[:, : plan.max_length]

    def advance(self, documents: Sequence[int]) -> None:
        """Add the new tokens to `lengths`, once per forward pass, after the last layer has appended them."""
        self.lengths = [cached + new for cached, new in zip(self.lengths, documents, strict=False)]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but these (indices into the current ones, in their new order)."""
        self.lengths = [self.lengths[one] for one in sequences]
        for layer, buffers in self._layers.items():
            index = torch.tensor(list(sequences), dtype=torch.int64, device=buffers[0].device)
            self._layers[layer] = buffers[0].index_select(0, index), buffers[1].index_select(0, index)

    def _buffers(self, layer: int, like: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Key and value buffers of a layer with capacity for max_length tokens, reallocated if they are smaller."""
        buffers = self._layers.get(layer)
        if buffers is None or buffers[0].shape[1] < max_length:
            capacity = -(-max_length * 5 // 4 // 64) * 64  # 25 % spare: amortised cost of appending is constant
            shape = (len(self), capacity, *like.shape[1:])
            grown = like.new_zeros(shape), like.new_zeros(shape)
            for old, new in zip(buffers or (), grown, strict=False):
                new[:, : old.shape[1]] = old
            buffers = self._layers[layer] = grown
        return buffers


@dataclass
class PackedSeqContext(PackedSeqParams):
    """The packed sequence of one forward pass, passed as megatron-core's `packed_seq_params`.

    `qkv_format` is `sbhd`: megatron-core then treats the packed sequence as one sequence of batch size 1, [s/cp, 1, h],
    and leaves document masking and rotary embedding to VitaCoreAttention.
    """

    qkv_format: str = "sbhd"
    layout: SequenceLayout | None = None
    """Documents of the packed sequence and their partition over ranks; always set in a forward pass."""
    cp_rank: int = 0
    """This rank in the context-parallel group."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the local tokens' position ids, [t, 1, d / 2] each; None: no rotary embedding."""
    cache: KVCache | None = None
    """KV cache in generation; None in training."""
    _schedules: dict[str, Schedule] = field(default_factory=dict, repr=False)
    _decoding: DecodePlan | None = field(default=None, repr=False)

    def schedule(self, device: torch.device, comm_type: str = "all_gather") -> Schedule:
        """This rank's block schedule; built for the first layer and cached for the others."""
        if comm_type not in self._schedules:
            assert self.layout is not None, "a PackedSeqContext needs a layout"
            self._schedules[comm_type] = build_schedule(self.layout, self.cp_rank, device, comm_type)
        return self._schedules[comm_type]

    def decoding(self, device: torch.device) -> DecodePlan:
        """Cache slots and mask of the new tokens; built for the first layer and cached for the others.

        Raises:
            ConfigError: context-parallel size above 1, or fewer documents than cached sequences.
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
