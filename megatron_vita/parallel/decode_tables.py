"""Which cached tokens the sequences of a decoding batch attend to, as the kernels of a device want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita import kernels
from megatron_vita.parallel.tables import gather_tables

Runs = Sequence[tuple[int, int]]
"""(first slot, tokens) of each run of a sequence's cached tokens on one rank, in the order of writing."""

_SHORT_BYTES = 65536
"""Keys and values of a sequence below which a decoding batch gathers them (measured on CPU: from 32 to 96 KiB a call
for each sequence costs as much as one for all of them)."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Sequences that hold few tokens: one kernel call for all, on copies padded to the longest."""

    rows: Tensor
    """int64 [b]: their rows in the batch."""
    slots: Tensor
    """int64 [b * longest]: their slots, padded with slots of others."""
    hidden: Tensor
    """float32 [b, 1, 1, longest]: -inf on padding, else 0."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Block tables of all sequences, for flash attention on CUDA, which reads the cache through them."""

    bounds: Tensor
    """int32 [B + 1]: 0, 1, ..., B; a query for each sequence."""
    table: Tensor
    """int32 [B, blocks]: blocks of each sequence, 0 behind its last one."""
    lengths: Tensor
    """int32 [B]: tokens of each sequence."""
    longest: int
    """Largest length."""
    block_size: int
    """Tokens of a block."""


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Cached tokens of the sequences that decode, on this rank; made once a step, for all layers."""

    alone: tuple[tuple[int, Runs], ...] = ()
    """(row, runs) of sequences with kernel calls of their own."""
    gathered: Gathered | None = None
    pages: Pages | None = None
    """If set, of all sequences; nothing else is."""

    @classmethod
    def build(
        cls, tables: Sequence[Runs], *, token_bytes: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> DecodeTables:
        """Choose kernel calls for sequences.

        Args:
            tables: runs of each sequence on this rank; [B]; runs begin where blocks begin.
            token_bytes: keys and values of one token in one layer.
            block_size: tokens of a block.
            dtype: of the cache.
            device: of the cache.
        """
        chosen = kernels.on(device)
        if chosen.reads_pages(block_size, dtype):
            return cls(pages=_pages(tables, block_size, device))
        if chosen.variable_length:
            return cls(_alone(tables, frozenset()))
        lengths = [sum(tokens for _, tokens in runs) for runs in tables]
        short = [row for row, length in enumerate(lengths) if 0 < length * token_bytes <= _SHORT_BYTES]
        if len(short) < 2:
            return cls(_alone(tables, frozenset()))
        held = np.array([lengths[row] for row in short])[:, None]
        number = np.arange(int(held.max()))[None]
        slots = np.array([tables[row][0][0] for row in short], dtype=np.int64)[:, None] + np.minimum(number, held - 1)
        for place, row in enumerate(short):
            if len(tables[row]) > 1:
                slots[place, : lengths[row]] = slots_of(tables[row])
                slots[place, lengths[row] :] = slots[place, 0]
        hidden = np.where(number < held, np.float32(0), np.float32(-np.inf))[:, None, None]
        gathered = Gathered(
            torch.from_numpy(np.array(short)), torch.from_numpy(slots.reshape(-1)), torch.from_numpy(hidden)
        )
        return cls(_alone(tables, frozenset(short)), gathered)


def slots_of(runs: Runs) -> np.ndarray:
    """int64 [tokens]: the slots of all runs."""
    return np.concatenate([np.arange(slot, slot + tokens) for slot, tokens in runs])


def _alone(tables: Sequence[Runs], gathered: frozenset[int]) -> tuple[tuple[int, Runs], ...]:
    return tuple((row, runs) for row, runs in enumerate(tables) if runs and row not in gathered)


def _pages(tables: Sequence[Runs], block_size: int, device: torch.device) -> Pages:
    lengths = [sum(tokens for _, tokens in runs) for runs in tables]
    table = np.zeros((len(tables), max(1, -(-max(lengths) // block_size))), dtype=np.int32)
    for row, runs in enumerate(tables):
        if runs:
            ends = ((slot // block_size, -(-(slot + tokens) // block_size)) for slot, tokens in runs)
            blocks = np.concatenate([np.arange(*end) for end in ends])
            table[row, : len(blocks)] = blocks
    arrays = (np.arange(len(tables) + 1, dtype=np.int32), table, np.array(lengths, dtype=np.int32))
    bounds, pages, counts = (torch.from_numpy(array) for array in arrays)
    return gather_tables(Pages(bounds, pages, counts, max(lengths), block_size)).to(device)
