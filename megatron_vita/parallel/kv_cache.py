"""Key/value cache of one rank in blocks of a few tokens, and what one forward pass does with it.

Each tensor-parallel rank keeps its own key/value heads, each context-parallel rank its own tokens: what a rank computed
stays where it was written until its blocks are freed. A slot is the place of one token: block * block_size + offset. A
sequence's blocks that follow each other in memory make a *run*, which attention reads as a view. Who owns which block
is decided by inference/blocks.py; here are only tensors. Legend: g key/value heads of this rank, d head size, B
sequences that decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.parallel.decode_tables import DecodeTables, Runs


class KVCache:
    """Keys and values of all layers of this rank."""

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_blocks: int,
        block_size: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the blocks; nothing is allocated later.

        Args:
            layers: megatron-core's layer numbers of this rank.
            num_blocks: of each layer.
            block_size: tokens of a block.
            groups: g.
            head_dim: d.
            dtype: of keys and values.
            device: of keys and values.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.token_bytes = self.block_bytes(layers=1, block_size=1, groups=groups, head_dim=head_dim, dtype=dtype)
        """Keys and values of one token in one layer."""
        # torch.empty touches no memory, so on a CPU unused blocks cost address space only.
        shape = (num_blocks * block_size, groups, head_dim)
        self._layers = {
            layer: (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for layer in layers
        }

    @staticmethod
    def block_bytes(*, layers: int, block_size: int, groups: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers of a rank: layers * 2 * block_size * g * d * bytes of an element."""
        return layers * 2 * block_size * groups * head_dim * dtype.itemsize

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [slots, g, d] each."""
        return self._layers[layer]

    def write(self, layer: int, key: Tensor, value: Tensor, step: CacheStep) -> None:
        """Store the step's keys and values [t, g, d] that this rank owns, in their slots."""
        for stored, new in zip(self[layer], (key, value), strict=True):
            stored.index_copy_(0, step.slots, new if step.rows is None else new.index_select(0, step.rows))


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Earlier tokens of a document: those of its sequence that were cached before this step."""

    rows: tuple[tuple[int, int], ...]
    """(first local index, tokens) of the document's new tokens on each context-parallel rank."""
    tokens: tuple[int, ...]
    """Cached tokens of the sequence on each context-parallel rank."""
    runs: Runs
    """Those of this rank."""


@dataclass(frozen=True, slots=True)
class CacheStep:
    """What attention needs to know of one forward pass over new tokens; the same for every layer.

    This rank's t local tokens are its tokens of the prompts' chunks, as the packed sequence's layout assigns them, and
    after them one token of every sequence that decodes. Those are on every context-parallel rank: a token's projections
    read the same weights whoever computes them, and so attention needs one exchange a layer.
    """

    cache: KVCache
    prefill_tokens: int
    """This rank's tokens of chunks, padding included."""
    prefixes: tuple[CachedPrefix, ...]
    """Of each chunk that is not its sequence's first."""
    decodes: DecodeTables | None
    """Cached tokens of each decoding sequence on this rank, the new one included where this rank owns it."""
    slots: Tensor
    """int64 [n]: where the new tokens that this rank owns go."""
    rows: Tensor | None
    """int64 [n]: their local indices; None: this rank owns all t."""
