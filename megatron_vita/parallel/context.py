"""What rides with a row through megatron-core's layers: its layout, its blocks and, when generating, its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.schedule import Schedule, build_schedule


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

    @property
    def empty(self) -> bool:
        """Nothing is cached yet: the next row is a prefill."""
        return not any(self.lengths)

    def append(self, layer: int, key: Tensor, value: Tensor, documents: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Add one row's keys and values behind what each sequence has.

        Args:
            layer: the layer's number.
            key: [t, g, d], the documents one after another.
            value: [t, g, d].
            documents: tokens of each document.

        Returns:
            all keys and values of the layer, [sequences, longest, g, d]; what lies behind a sequence's end is zero.
        """
        counts = documents[: len(self.lengths)]
        needed = max(have + new for have, new in zip(self.lengths, counts, strict=True))
        keys, values = self._room(layer, key, needed)
        start = 0
        for sequence, (have, new) in enumerate(zip(self.lengths, counts, strict=True)):
            keys[sequence, have : have + new] = key[start : start + new]
            values[sequence, have : have + new] = value[start : start + new]
            start += new
        return keys[:, :needed], values[:, :needed]

    def advance(self, documents: Sequence[int]) -> None:
        """Count the tokens of a row, after its last layer."""
        self.lengths = [have + new for have, new in zip(self.lengths, documents, strict=False)]

    def keep(self, sequences: Sequence[int]) -> None:
        """Forget all but these sequences (indices, ascending): the others are finished."""
        self.lengths = [self.lengths[one] for one in sequences]
        for layer, (keys, values) in self._layers.items():
            index = torch.tensor(list(sequences), dtype=torch.int64, device=keys.device)
            self._layers[layer] = keys.index_select(0, index), values.index_select(0, index)

    def _room(self, layer: int, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < needed:
            capacity = -(-needed * 5 // 4 // 64) * 64  # grow by a quarter, so that appending costs little on average
            shape = (len(self.lengths), capacity, *like.shape[1:])
            grown = like.new_zeros(shape), like.new_zeros(shape)
            for old, new in zip(held or (), grown, strict=False):
                new[:, : old.shape[1]] = old
            held = self._layers[layer] = grown
        return held


@dataclass
class RowContext(PackedSeqParams):
    """The row that a forward pass sees, in the place where megatron-core carries packed-sequence settings.

    `qkv_format` is `sbhd`: megatron-core then treats the row as one ordinary sequence [s/cp, 1, h] and leaves documents
    to our attention and positions to our rotary table.
    """

    qkv_format: str = "sbhd"
    layout: SequenceLayout | None = None
    """Who owns which token."""
    cp_rank: int = 0
    cache: KVCache | None = None
    """Past keys and values, when generating."""
    _schedule: Schedule | None = field(default=None, repr=False)

    def schedule(self, device: torch.device) -> Schedule:
        """This rank's blocks; built for the first layer, kept for the rest."""
        if self._schedule is None:
            assert self.layout is not None, "a RowContext needs a layout"
            self._schedule = build_schedule(self.layout, self.cp_rank, device)
        return self._schedule
