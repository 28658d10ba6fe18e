"""Reuse of cached blocks by sequences that begin alike.

A prompt's tokens are cut into blocks. The key of a block is a digest of all tokens up to its end and of the pictures
among them, so equal keys mean equal keys and values. A block whose sequence has ended stays until its place is needed,
the longest unused first. Blocks that mix tokens of two chunks, or that are not full, are not shared.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_vita.data.example import TileSlot
from megatron_vita.inference.blocks import BlockManager, BlockTable
from megatron_vita.layout import Span

Key = bytes


def block_keys(
    tokens: npt.NDArray[np.int32],
    block_size: int,
    tiles: Sequence[TileSlot],
    digests: Sequence[bytes],
    tokens_per_tile: int,
) -> list[Key]:
    """Keys of a prompt's full blocks.

    Args:
        tokens: `[n]`, placeholders expanded.
        block_size: tokens of a block.
        tiles: of the prompt, in token order.
        digests: of each media item that a tile may name: equal digests, equal pixels.
        tokens_per_tile: placeholder tokens of a tile.
    """
    marks: dict[int, list[bytes]] = {}  # block -> what its placeholders show
    for tile in tiles:
        place = (tile.row, tile.col, tile.rows, tile.cols, tile.thumbnail)
        for block in range(tile.first_token // block_size, (tile.first_token + tokens_per_tile - 1) // block_size + 1):
            shown = f"{tile.first_token - block * block_size} {place} ".encode()
            marks.setdefault(block, []).append(shown + digests[tile.media])
    keys: list[Key] = []
    previous = b""
    for block in range(len(tokens) // block_size):
        digest = hashlib.blake2b(previous, digest_size=16)
        digest.update(tokens[block * block_size : (block + 1) * block_size].tobytes())
        for shown in marks.get(block, ()):
            digest.update(len(shown).to_bytes(4, "little") + shown)
        previous = digest.digest()
        keys.append(previous)
    return keys


class PrefixCache(BlockManager):
    """A BlockManager whose blocks may belong to several sequences, and outlive them."""

    def __init__(self, *, num_blocks: int, block_size: int, ranks: int, rank: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size, ranks=ranks, rank=rank)
        self._users: list[dict[int, int]] = [{} for _ in range(ranks)]
        self._found: dict[Key, tuple[int, int]] = {}  # key -> (rank, block)
        self._key_of: dict[tuple[int, int], Key] = {}
        self._unused: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]  # longest unused first

    def share(self, table: BlockTable, keys: Sequence[Key]) -> int:
        """Begin a sequence with the cached blocks of its longest known prefix.

        Args:
            table: without tokens.
            keys: of the prompt's blocks that may be shared.

        Returns:
            tokens of the shared prefix.
        """
        shared = 0
        for key in keys:
            if key not in self._found:
                break
            rank, block = self._found[key]
            self._users[rank][block] = self._users[rank].get(block, 0) + 1
            self._unused[rank].pop(block, None)
            table.blocks[rank].append(block)
            table.tokens[rank] += self.block_size
            shared += self.block_size
        self._extend_runs(table, 0)
        return shared

    def beside_shared(self, keys: Sequence[Key]) -> tuple[int, int]:
        """What `share` would leave: tokens of the longest known prefix, and the free blocks of the rank that then has
        fewest. Blocks of the prefix that nobody uses count as free until it is shared."""
        known = keys[: self.shareable(keys)]
        unused = [0] * self.ranks
        for key in known:
            rank, block = self._found[key]
            unused[rank] += block in self._unused[rank]
        free = min(self._available(rank) - count for rank, count in enumerate(unused))
        return len(known) * self.block_size, free

    def shareable(self, keys: Sequence[Key]) -> int:
        """Blocks of the longest known prefix."""
        known = 0
        for key in keys:
            if key not in self._found:
                break
            known += 1
        return known

    def publish(
        self, table: BlockTable, keys: Sequence[Key], start: int, spans: Sequence[Sequence[Span]], before: Sequence[int]
    ) -> None:
        """Let other sequences find the full blocks of a chunk whose keys and values are written.

        Args:
            table: the chunk included.
            keys: of the prompt's blocks.
            start: tokens before the chunk.
            spans: the chunk's spans on every rank; Span.start counts from the chunk's start.
            before: the sequence's tokens on every rank before the chunk.
        """
        size = self.block_size
        for rank, own in enumerate(spans):
            local = before[rank]
            for span in own:
                first, last = start + span.start, start + span.stop
                for block in range(-(-first // size), min(last // size, len(keys))):
                    at = local + block * size - first
                    if at % size == 0 and keys[block] not in self._found:
                        place = rank, table.blocks[rank][at // size]
                        self._found[keys[block]] = place
                        self._key_of[place] = keys[block]
                local += span.stop - span.start

    def _available(self, rank: int) -> int:
        return self._free[rank].count + len(self._unused[rank])

    def _take(self, rank: int, count: int, after: int | None) -> list[int]:
        missing = count - self._free[rank].count
        if missing > 0:
            dropped = [self._unused[rank].popitem(last=False)[0] for _ in range(missing)]
            for block in dropped:
                del self._found[self._key_of.pop((rank, block))]
            self._free[rank].give(dropped)
        taken = super()._take(rank, count, after)
        self._users[rank].update(dict.fromkeys(taken, 1))
        return taken

    def _release(self, rank: int, blocks: Sequence[int]) -> None:
        gone = []
        # From the end: of a prefix that nobody uses the last block is dropped first, so the rest stays useful.
        for block in reversed(blocks):
            self._users[rank][block] -= 1
            if not self._users[rank][block]:
                del self._users[rank][block]
                if (rank, block) in self._key_of:
                    self._unused[rank][block] = None
                else:
                    gone.append(block)
        if gone:
            super()._release(rank, gone)
