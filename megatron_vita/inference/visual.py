"""Visual tokens of a step's chunks: every tile is encoded once, on one rank of the tensor x context group.

The pixels of a chunk's tiles are decoded just before it, by the ranks that encode them, and dropped after it. A tile
whose placeholders continue in the next chunk stays on its rank until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_vita.device import torch_device
from megatron_vita.errors import VitaError
from megatron_vita.inference.scheduler import StepPlan
from megatron_vita.inference.sequence import Sequence
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models.vita import VitaModel


class Pixels(Protocol):
    """Pixels of a prompt's tiles."""

    def tiles(self, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, 3, S, S]. Raises DataError."""

    def close(self) -> None:
        """Free decoders and files."""


@dataclass(frozen=True, slots=True)
class BlackTiles:
    """Pixels of a prompt whose pictures are not shown."""

    side: int
    """S."""

    def tiles(self, start: int, stop: int) -> Tensor:
        """Black tiles."""
        return torch.zeros(stop - start, 3, self.side, self.side, dtype=torch.uint8)

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True)
class _Tile:
    document: int
    sequence: Sequence
    number: int
    first_token: int
    """Counted from the chunk's start; negative where the tile began in an earlier chunk."""


class VisualTokens:
    """Encodes the tiles of chunks on this rank, a rank of the first pipeline stage of a model with a tower."""

    def __init__(self, model: VitaModel, tokens_per_tile: int, open_pixels: Callable[[Sequence], Pixels]) -> None:
        """No tile is encoded.

        Args:
            model: its first stage.
            tokens_per_tile: placeholder tokens of a tile.
            open_pixels: opens the media of a sequence.
        """
        self._model = model
        self._groups = model.groups
        self._tokens_per_tile = tokens_per_tile
        self._open = open_pixels
        self._pixels: dict[int, Pixels] = {}
        self._kept: dict[tuple[int, int], tuple[int, Tensor | None]] = {}  # (sequence, tile) -> (rank, its features)
        self._loaded: dict[tuple[int, int], tuple[int, Tensor | None]] = {}  # -> (rank, its pixels)
        self._turn = 0  # the rank that gets the next tile that does not divide
        self.encoded = 0
        """Tiles that this rank has encoded, so far."""

    def load(self, plan: StepPlan) -> dict[int, VitaError]:
        """Decode this rank's share of the tiles that the plan's chunks need and nobody has encoded.

        Returns:
            errors by number of the sequence; errors that are not the media's are raised.
        """
        fresh = [
            tile
            for tile in _tiles(plan, self._tokens_per_tile)
            # A preempted sequence begins again, perhaps with other chunks: all tiles that begin in one are encoded.
            if tile.first_token >= 0 or (tile.sequence.number, tile.number) not in self._kept
        ]
        ranks = self._groups.tp_size * self._groups.cp_size
        base, rest = divmod(len(fresh), ranks)
        rank_of = (np.repeat(np.arange(ranks), [base + (rank < rest) for rank in range(ranks)]) + self._turn) % ranks
        self._turn = (self._turn + rest) % ranks  # short chunks would give all their tiles to the first rank
        errors: dict[int, VitaError] = {}
        own: dict[Sequence, list[int]] = {}
        for tile, rank in zip(fresh, rank_of.tolist(), strict=True):
            self._loaded[tile.sequence.number, tile.number] = (rank, None)
            if rank == self._groups.group_rank:
                own.setdefault(tile.sequence, []).append(tile.number)
        for sequence, numbers in own.items():
            try:
                if sequence.number not in self._pixels:
                    self._pixels[sequence.number] = self._open(sequence)
                pixels = self._pixels[sequence.number].tiles(numbers[0], numbers[-1] + 1)
            except VitaError as error:
                errors[sequence.number] = error
                continue
            for number, one in zip(numbers, pixels, strict=True):
                self._loaded[sequence.number, number] = (self._groups.group_rank, one)
        return errors

    def encode(self, plan: StepPlan, layout: SequenceLayout) -> tuple[Tensor, TileRoutes] | None:
        """Encode what `load` decoded; the tower's collectives, if any, join all ranks of a tensor group.

        Args:
            plan: that of `load`, perhaps without sequences that failed.
            layout: its packed sequence.

        Returns:
            visual tokens that this rank holds [n * tokens_per_tile, h], and where they go; None for chunks without
            visual tokens, on every rank alike.
        """
        tiles = _tiles(plan, self._tokens_per_tile)
        keys = [(tile.sequence.number, tile.number) for tile in tiles]
        loaded = [key for key in keys if key in self._loaded]
        first = self._groups.cp_rank * self._groups.tp_size
        encoders = [self._loaded[key][0] for key in loaded]
        counts = [encoders.count(first + rank) for rank in range(self._groups.tp_size)]
        own = [(key, pixels) for key in loaded if (pixels := self._loaded[key][1]) is not None]
        features: dict[tuple[int, int], Tensor] = {}
        if any(counts):
            side = self._model.model.vision.image_size if self._model.model.vision is not None else 0
            stacked = torch.stack([pixels for _, pixels in own]) if own else torch.empty(0, 3, side, side).byte()
            encoded = self._model.encode(stacked.to(torch_device()), counts)
            features = dict(
                zip([key for key, _ in own], encoded.unflatten(0, (len(own), -1)) if own else (), strict=True)
            )
            self.encoded += len(own)
        holders = {key: (self._loaded[key][0], features.get(key)) for key in loaded}
        holders |= {key: self._kept[key] for key in keys if key not in holders}
        self._loaded = {}
        planned = {chunk.sequence.number for chunk in plan.chunks}
        self._kept = {key: held for key, held in self._kept.items() if key[0] not in planned}
        for tile, key in zip(tiles, keys, strict=True):
            if self._goes_on(tile, plan):
                rank, held = holders[key]
                self._kept[key] = rank, None if held is None else held.clone()  # without the chunk's other tiles
        if not tiles:
            return None
        mine = [held for key in keys if (held := holders[key][1]) is not None]
        width = self._model.config.hidden_size
        empty = torch.empty(0, width, dtype=self._model.config.params_dtype, device=torch_device())
        starts = layout.starts[[tile.document for tile in tiles]]
        routes = TileRoutes(
            layout,
            starts + np.array([tile.first_token for tile in tiles], dtype=np.int64),
            self._tokens_per_tile,
            self._groups.tp_size,
            encoders=np.array([holders[key][0] for key in keys], dtype=np.int64),
            cut_by=np.array([tile.document for tile in tiles], dtype=np.int64),
        )
        return torch.cat(mine) if mine else empty, routes

    def forget(self, sequence: Sequence) -> None:
        """Free what belongs to a sequence that is finished or given up."""
        pixels = self._pixels.pop(sequence.number, None)
        if pixels is not None:
            pixels.close()
        for store in (self._kept, self._loaded):
            for key in [key for key in store if key[0] == sequence.number]:
                del store[key]

    def _goes_on(self, tile: _Tile, plan: StepPlan) -> bool:
        chunk = plan.chunks[tile.document]
        return tile.first_token + self._tokens_per_tile > chunk.stop - chunk.start


def _tiles(plan: StepPlan, tokens_per_tile: int) -> list[_Tile]:
    """Tiles with visual tokens in the plan's chunks, in order."""
    found = []
    for document, chunk in enumerate(plan.chunks):
        slots = chunk.sequence.example.tiles
        if not slots:
            continue
        firsts = chunk.sequence.first_tokens
        begin = int(np.searchsorted(firsts, chunk.start - tokens_per_tile, side="right"))
        end = int(np.searchsorted(firsts, chunk.stop, side="left"))
        found += [
            _Tile(document, chunk.sequence, number, int(firsts[number]) - chunk.start) for number in range(begin, end)
        ]
    return found
