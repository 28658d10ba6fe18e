"""Which blocks of attention one rank computes for a row: index arithmetic, done once per row for all its layers.

A rank owns spans of documents. Each span needs one causal block (its own keys) and, unless it starts its document, one
full block (the document's keys before it). A kernel call costs as much as a short document, so blocks of equal shape go
through one call; short causal blocks are padded to equal shape, which is free: no real query sees padding at the
end, and padding sends no gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita.layout import SequenceLayout, Span

_PAD_BELOW = 512
"""Longest block that may be padded: above it a call costs far more than its overhead."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor: a contiguous run, taken as a view, or a list, gathered."""

    start: int
    count: int
    index: Tensor | None = None
    """int64 [count]; none: the run [start, start + count)."""

    def of(self, source: Tensor) -> Tensor:
        """Those rows of `source`."""
        if self.index is None:
            return source.narrow(0, self.start, self.count)
        return source.index_select(0, self.index)

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values` into those rows of `target`."""
        if self.index is None:
            target.narrow(0, self.start, self.count).copy_(values)
        else:
            target.index_copy_(0, self.index, values)

    def add(self, target: Tensor, values: Tensor) -> None:
        """Add `values` to those rows of `target`."""
        if self.index is None:
            target.narrow(0, self.start, self.count).add_(values)
        else:
            target.index_add_(0, self.index, values)


@dataclass(frozen=True, slots=True)
class CausalBlocks:
    """Every local token, once, dealt into batches of equal causal blocks that stand one after another."""

    batches: tuple[tuple[int, int], ...]
    """(blocks, tokens of each) of every kernel call, in the order of the dealt tokens."""
    read: Tensor | None
    """int64 [dealt]: the local token that stands at each place; padding repeats the last token of its block. None: the
    local tokens as they are."""
    place: Tensor | None
    """int64 [t]: where each local token stands."""
    padding: Tensor | None
    """int64: the places that are padding; none: no padding."""

    def deal(self, rows: Tensor) -> Tensor:
        """[t, ...] -> [dealt, ...]."""
        return rows if self.read is None else rows.index_select(0, self.read)

    def collect(self, dealt: Tensor) -> Tensor:
        """[dealt, ...] -> [t, ...], in local order."""
        return dealt if self.place is None else dealt.index_select(0, self.place)


@dataclass(frozen=True, slots=True)
class FullBlocks:
    """Blocks of equal shape without a mask, computed by one kernel call."""

    blocks: int
    queries: Rows
    """[blocks * queries of each] local rows."""
    keys: Rows
    """[blocks * keys of each] row positions."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All the blocks of one rank for one row."""

    causal: CausalBlocks
    full: tuple[FullBlocks, ...]
    from_ranks: Tensor | None
    """int64 [s]: where each row position lies when the ranks' local tokens stand one after another; none at cp 1."""
    to_ranks: Tensor | None
    """int64 [s]: its inverse, the row positions in rank order."""
    tokens: int
    """Local tokens, t."""


def build_schedule(layout: SequenceLayout, cp_rank: int, device: torch.device) -> Schedule:
    """The blocks of one context-parallel rank; index tensors on `device`."""
    spans = layout.spans(cp_rank)
    shapes: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        if span.start:
            shapes.setdefault((span.stop - span.start, span.start), []).append(span)
    full = [_full_blocks(group, layout, device) for group in shapes.values()]
    from_ranks = to_ranks = None
    if layout.cp > 1:
        rank, index = layout.owner
        from_ranks = torch.from_numpy(rank * layout.local_length + index).to(device)
        order = np.concatenate([layout.local_positions(one) for one in range(layout.cp)])
        to_ranks = torch.from_numpy(order).to(device)
    return Schedule(_causal_blocks(spans, device), tuple(full), from_ranks, to_ranks, layout.local_length)


def _groups(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans whose causal blocks share a call: of equal length, or short and of nearly equal length."""
    groups: list[list[Span]] = []
    longest = 0
    for span in sorted(spans, key=lambda one: one.start - one.stop):  # longest first, row order among equals
        length = span.stop - span.start
        slack = max(8, longest // 8) if longest <= _PAD_BELOW else 0
        if groups and longest - length <= slack:
            groups[-1].append(span)
        else:
            groups.append([span])
            longest = length
    return [sorted(group, key=lambda one: one.local_start) for group in groups]


def _causal_blocks(spans: Sequence[Span], device: torch.device) -> CausalBlocks:
    batches, reads, pads = [], [], []
    for group in _groups(spans):
        lengths = np.array([span.stop - span.start for span in group])[:, None]
        starts = np.array([span.local_start for span in group])[:, None]
        each = int(lengths.max())
        token = np.arange(each)[None, :]
        reads.append((starts + np.minimum(token, lengths - 1)).reshape(-1))
        pads.append((token >= lengths).reshape(-1))
        batches.append((len(group), each))
    read, pad = np.concatenate(reads), np.concatenate(pads)
    if np.array_equal(read, np.arange(len(read))):
        return CausalBlocks(tuple(batches), None, None, None)
    place = np.empty(len(read) - int(pad.sum()), dtype=np.int64)
    place[read[~pad]] = np.flatnonzero(~pad)
    padding = torch.from_numpy(np.flatnonzero(pad)).to(device) if pad.any() else None
    return CausalBlocks(tuple(batches), torch.from_numpy(read).to(device), torch.from_numpy(place).to(device), padding)


def _full_blocks(spans: Sequence[Span], layout: SequenceLayout, device: torch.device) -> FullBlocks:
    queries, keys = spans[0].stop - spans[0].start, spans[0].start
    query_rows = _rows([span.local_start for span in spans], queries, device)
    key_rows = _rows([int(layout.starts[span.document]) for span in spans], keys, device)
    return FullBlocks(len(spans), query_rows, key_rows)


def _rows(starts: Sequence[int], each: int, device: torch.device) -> Rows:
    """Rows of equal runs: a view where the runs touch."""
    if all(later - earlier == each for earlier, later in itertools.pairwise(starts)):
        return Rows(starts[0], each * len(starts))
    index = (np.array(starts)[:, None] + np.arange(each)).reshape(-1)
    return Rows(0, index.size, torch.from_numpy(index).to(device))
