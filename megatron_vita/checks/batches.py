"""Build this rank's batches from packs, as the loader builds them from shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vita.checks.tiny import Pack
from megatron_vita.config import StageConfig
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.loading.batch import Batch
from megatron_vita.data.loading.loader import StepBatches
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.parallel.groups import Groups


def step_batches(stage: StageConfig, groups: Groups, packs: Sequence[Pack]) -> StepBatches:
    """This rank's view of one global batch: packed sequences of `micro_batch_size` packs go to data ranks in turn."""
    size = stage.train.micro_batch_size
    packed = [packs[start : start + size] for start in range(0, len(packs), size)]
    labels = sum(int((pack.labels >= 0).sum()) for pack in packs)
    return StepBatches(
        micro_batches=[_batch(stage, groups, each) for each in packed[groups.dp_rank :: groups.dp_size]],
        pack_ids=tuple(range(len(packs))),
        sample_ids=(),
        num_labels=labels,
        failed=(),
        consumed_packs=len(packs),
    )


def _batch(stage: StageConfig, groups: Groups, packs: Sequence[Pack]) -> Batch:
    """Concatenate packs; the padding at the end is a document of its own."""
    starts = np.cumsum([0, *(len(pack.tokens) for pack in packs)])
    padding = stage.data.seq_length * len(packs) - int(starts[-1])
    reset = stage.data.reset_per_document
    documents = [length for pack in packs for length in (pack.documents if reset else (len(pack.tokens),))]
    documents += [padding] if padding else []
    layout = SequenceLayout(tuple(documents), cp=groups.cp_size, sp=groups.sequence_shards)
    places = [start + first for pack, start in zip(packs, starts, strict=False) for first in pack.first_token]
    first_token = np.array(places, dtype=np.int64)
    per_tile = stage.model.vision.tokens_per_tile if stage.model.vision else 1
    routes = TileRoutes(layout, first_token, per_tile, tp=groups.tp_size)
    mine = torch.from_numpy(layout.local_positions(groups.cp_rank))
    tiles = torch.cat([pack.tiles for pack in packs])
    own = routes.tiles_of(groups.group_rank) if groups.first_stage else range(0)
    return Batch(
        tokens=_joined([pack.tokens for pack in packs], padding, 0)[mine][None],
        labels=_joined([pack.labels for pack in packs], padding, IGNORE_INDEX)[mine][None],
        positions=torch.from_numpy(layout.positions_in_document)[mine][None],
        layout=layout,
        tiles=tiles[own.start : own.stop],
        tile_ids=torch.arange(own.start, own.stop),
        routes=routes,
        sample_ids=(),
    )


def _joined(parts: Sequence[Tensor], padding: int, fill: int) -> Tensor:
    return torch.cat([*parts, parts[0].new_full((padding,), fill)])
