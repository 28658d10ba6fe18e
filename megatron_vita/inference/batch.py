"""A step plan as this rank's tensors: tokens, positions, and the use of the key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita.inference.blocks import BlockManager
from megatron_vita.inference.prefix_cache import PrefixCache
from megatron_vita.inference.scheduler import StepPlan
from megatron_vita.inference.sequence import Sequence
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.decode_tables import DecodeTables
from megatron_vita.parallel.kv_cache import CachedPrefix, CacheStep, KVCache
from megatron_vita.parallel.tables import gather_tables


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass on one rank; t local tokens: those of chunks, then one of each decoding sequence."""

    plan: StepPlan
    layout: SequenceLayout | None
    """The packed sequence of the chunks."""
    tokens: Tensor
    """int64 [1, t]."""
    positions: Tensor
    """int64 [1, t]."""
    step: CacheStep
    sampled: tuple[Sequence, ...]
    """Sequences that get a token from this step: those of last chunks, then those that decode."""
    ends: tuple[tuple[int, int], ...]
    """(context rank, local index) of the last token of each last chunk."""


def build_batch(plan: StepPlan, blocks: BlockManager, cache: KVCache, device: torch.device) -> StepBatch:
    """Give the plan's chunks their blocks, and make this rank's tensors.

    Args:
        plan: of the next step; not empty.
        blocks: of the cache; the chunks' tokens are added.
        cache: of this rank.
        device: of the tensors.
    """
    layout = plan.layout(blocks.ranks)
    tokens, positions, slots = [], [], []
    prefixes: list[CachedPrefix] = []
    ends = []
    local_length = 0
    if layout is not None:
        local_length = layout.local_length
        packed = np.concatenate([chunk.sequence.ids(chunk.start, chunk.stop) for chunk in plan.chunks])
        starts = np.array([chunk.start for chunk in plan.chunks] + [0] * (len(layout.documents) - len(plan.chunks)))
        place = layout.positions_in_document + np.repeat(starts, layout.documents)
        own = layout.local_positions(blocks.rank)
        padded = np.zeros(layout.length, dtype=np.int64)
        padded[: len(packed)] = packed
        tokens.append(padded[own])
        positions.append(place[own])
        rows = _rows(layout, blocks.ranks)
        for number, chunk in enumerate(plan.chunks):
            table = chunk.sequence.table
            before, runs = tuple(table.tokens), tuple(table.runs)
            slots.append(blocks.add(table, [count for _, count in rows[number]]))
            if any(before):
                prefixes.append(CachedPrefix(rows[number], before, runs))
            if isinstance(blocks, PrefixCache) and chunk.sequence.keys:
                spans = [
                    [span for span in layout.spans(rank) if span.document == number] for rank in range(blocks.ranks)
                ]
                blocks.publish(table, chunk.sequence.keys, chunk.start, spans, before)
            if chunk.last:
                owner, index = layout.owner
                end = int(layout.starts[number]) + layout.documents[number] - 1
                ends.append((int(owner[end]), int(index[end])))
    decodes = plan.decodes
    tokens.append(np.array([sequence.generated[-1] for sequence in decodes], dtype=np.int64))
    positions.append(np.array([len(sequence) - 1 for sequence in decodes], dtype=np.int64))
    owned = [number for number, slot in enumerate(plan.slots) if slot is not None]
    prefilled = np.concatenate(slots) if slots else np.empty(0, dtype=np.int64)
    slots.append(np.array([plan.slots[number] for number in owned], dtype=np.int64))
    written = None
    if len(prefilled) + len(owned) < local_length + len(decodes):
        index = np.concatenate([np.arange(len(prefilled)), local_length + np.array(owned, dtype=np.int64)])
        written = torch.from_numpy(index)
    token_ids, position_ids, new_slots = (torch.from_numpy(np.concatenate(one)) for one in (tokens, positions, slots))
    tables = gather_tables((token_ids[None], position_ids[None], new_slots, written)).to(device)
    step = CacheStep(
        cache=cache,
        prefill_tokens=local_length,
        prefixes=tuple(prefixes),
        decodes=_decode_tables(plan, cache, device) if decodes else None,
        slots=tables[2],
        rows=tables[3],
    )
    return StepBatch(
        plan=plan,
        layout=layout,
        tokens=tables[0],
        positions=tables[1],
        step=step,
        sampled=(*(chunk.sequence for chunk in plan.chunks if chunk.last), *decodes),
        ends=tuple(ends),
    )


def _decode_tables(plan: StepPlan, cache: KVCache, device: torch.device) -> DecodeTables:
    return DecodeTables.build(
        [sequence.table.runs for sequence in plan.decodes],
        token_bytes=cache.token_bytes,
        block_size=cache.block_size,
        dtype=cache.dtype,
        device=device,
    )


def _rows(layout: SequenceLayout, ranks: int) -> list[tuple[tuple[int, int], ...]]:
    """(first local index, tokens) of every document on every rank: a rank's tokens of a document are neighbours."""
    rows = [[(0, 0)] * ranks for _ in layout.documents]
    for rank in range(ranks):
        for span in layout.spans(rank):
            first, count = rows[span.document][rank]
            rows[span.document][rank] = (first if count else span.local_start, count + span.stop - span.start)
    return [tuple(one) for one in rows]
