"""Packed rows of a stage without data: documents, tiles and labels as a mix of the stage would give.

Where the stage's shards exist, rows are taken from them (`rows_of_shards`): the first packs of the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_vita.config import StageConfig
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.loading.balance import assign_packs
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import RankCoords, order_of
from megatron_vita.data.loading.packed_batch import build_packed_sequence
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.device import page_locked
from megatron_vita.layout import Int64, SequenceLayout, TileRoutes

_TILES = (1, 3, 5, 7, 7, 9, 13)
"""Tiles of a picture, thumbnail included, as dynamic tiling gives for ordinary photos."""
_AROUND_A_TILE = 6
"""Tokens beside a video frame's context tokens: `Frame12: <img>...</img>` and a newline (docs/tokens.md)."""
_SHORT_TEXT, _LONG_TEXT = (60, 700), (300, 3000)
"""Fewest and most text tokens of a sample: of an instruction with pictures, and of a text or the end of a video."""
_ANSWERED = 0.6
"""Fraction of a sample's text that has a label: its answers."""
_TEXT_ALONE = 5
"""One sample in so many has no picture."""


@dataclass(frozen=True)
class Row:
    """A packed row, the same on every rank."""

    documents: tuple[int, ...]
    """Lengths; their sum is the sequence length."""
    first_token: Int64
    """Global index of each tile's first placeholder, ascending; int64 `[tiles]`."""
    answers: tuple[tuple[int, int], ...]
    """Ranges of labelled tokens, by global index."""

    def batch(self, coords: RankCoords, tokens_per_tile: int, image_size: int) -> Batch:
        """This rank's Batch of the row: tokens and pixels are zeros, positions and routes are real."""
        layout = SequenceLayout(self.documents, coords.cp_size, coords.tp_size if coords.sequence_parallel else 1)
        routes = TileRoutes(layout, self.first_token, tokens_per_tile, coords.tp_size)
        tiles = len(routes.tiles_of(coords.group_rank)) if coords.holds_tower else 0
        local = layout.local_positions(coords.cp_rank)
        labelled = np.zeros(layout.length + 1, dtype=np.int64)
        for start, stop in self.answers:
            labelled[start] += 1
            labelled[stop] -= 1
        labels = np.where(np.cumsum(labelled)[local] > 0, 0, IGNORE_INDEX)
        return Batch(
            tokens=torch.zeros(1, len(local), dtype=torch.int64),
            labels=torch.from_numpy(labels)[None],
            positions=torch.from_numpy(layout.positions_in_document[local])[None],
            layout=layout,
            tiles=page_locked((tiles, 3, image_size, image_size), torch.uint8).zero_(),
            tile_ids=torch.zeros(tiles, dtype=torch.int64),
            routes=routes,
            sample_ids=(0,),
        )


def made_rows(stage: StageConfig, count: int) -> list[Row]:
    """Rows of `data.seq_length * micro_batch_size` tokens, from the stage's seed.

    With document masking they are packed from instructions about pictures, a fifth of them text alone. Without it a
    pack is a document: one long video and its text, or long text for a model without a tower.
    """
    generator = np.random.default_rng(stage.train.seed)
    each = stage.data.seq_length
    rows = []
    for _ in range(count):
        packs = [
            (_instructions if stage.data.reset_per_document else _video)(stage, generator, each)
            for _ in range(stage.train.micro_batch_size)
        ]
        starts = np.arange(len(packs)) * each
        rows.append(
            Row(
                documents=tuple(length for pack in packs for length in pack.documents),
                first_token=np.concatenate([pack.first_token + at for pack, at in zip(packs, starts, strict=True)]),
                answers=tuple(
                    (start + int(at), stop + int(at))
                    for pack, at in zip(packs, starts, strict=True)
                    for start, stop in pack.answers
                ),
            )
        )
    return rows


def _instructions(stage: StageConfig, generator: np.random.Generator, length: int) -> Row:
    """A pack of many short samples, and padding."""
    per_tile = stage.model.vision.tokens_per_tile if stage.model.vision else 0
    documents: list[int] = []
    tiles: list[int] = []
    answers: list[tuple[int, int]] = []
    at = 0
    while True:
        with_picture = per_tile > 0 and generator.integers(_TEXT_ALONE) > 0
        count = int(generator.choice(_TILES)) if with_picture else 0
        text = int(generator.integers(*(_SHORT_TEXT if with_picture else _LONG_TEXT)))
        size = count * per_tile + text
        if at + size > length:
            break
        tiles += [at + 2 + tile * per_tile for tile in range(count)]
        answers.append((at + size - max(1, int(_ANSWERED * text)), at + size - 1))
        documents.append(size)
        at += size
    if not documents:  # shorter than any sample
        documents, answers, at = [length], [(length // 2, length)], length
    if at < length:
        documents.append(length - at)
    return Row(tuple(documents), np.array(tiles, dtype=np.int64), tuple(answers))


def _video(stage: StageConfig, generator: np.random.Generator, length: int) -> Row:
    """A pack that is one document, filled by the frames of a video, or by text."""
    text = min(int(generator.integers(*_LONG_TEXT)), length // 2)
    if stage.model.vision is None:
        return Row((length,), np.zeros(0, dtype=np.int64), ((length // 2, length - 1),))
    step = stage.model.vision.tokens_per_tile + _AROUND_A_TILE
    frames = (length - text) // step
    first = _AROUND_A_TILE // 2 + step * np.arange(frames, dtype=np.int64)
    end = min(frames * step + text, length)
    rest = (length - end,) if end < length else ()
    return Row((end, *rest), first, ((end - max(1, int(_ANSWERED * text)), end - 1),))


def rows_of_shards(stage: StageConfig, dp_size: int, count: int) -> list[Row]:
    """The first rows of data rank 0 in the stage's first step, those with the most tiles first.

    Raises:
        DataError: damaged shards.
    """
    shards = ShardSet(stage.data.data_path)
    order = order_of(shards, stage.data, stage.train)
    packs = order.packs(0)
    mine = assign_packs(packs, order.work[packs], dp_size)[0].tolist()
    size = stage.train.micro_batch_size
    groups = [mine[start : start + size] for start in range(0, len(mine), size)]
    groups.sort(key=lambda one: -sum(len(shards.pack_tiles(pack)) for pack in one))
    rows = []
    for group in groups[:count]:
        packed = build_packed_sequence(
            shards, group, seq_length=stage.data.seq_length, reset=stage.data.reset_per_document
        )
        answers = []
        for pack, start in zip(packed.packs, packed.pack_starts, strict=False):
            labelled = np.concatenate([[0], shards.labels(pack) != IGNORE_INDEX, [0]]).astype(np.int8)
            changes = np.flatnonzero(np.diff(labelled)) + int(start)
            answers += [(int(a), int(b)) for a, b in changes.reshape(-1, 2)]
        rows.append(Row(packed.documents, packed.first_token, tuple(answers)))
    return rows


def rows_of(stage: StageConfig, dp_size: int, count: int) -> list[Row]:
    """`count` rows: of the shards at `data.data_path` if they exist, else made; the one with the most tiles first."""
    if stage.data.data_path and Path(f"{stage.data.data_path}.json").exists():
        found = rows_of_shards(stage, dp_size, count)
    else:
        found = sorted(made_rows(stage, count), key=lambda row: -len(row.first_token))
    return [found[index % len(found)] for index in range(count)]
