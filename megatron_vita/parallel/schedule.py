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
class BlockBatch:
    """Blocks of equal shape, computed by one kernel call."""

    blocks: int
    queries_each: int
    keys_each: int
    queries: Rows
    """[blocks * queries_each] local rows. Padding repeats the last token of its block."""
    keys: Rows
    """[blocks * keys_each] rows: local ones for a causal batch, row positions for a full one."""
    write: Rows
    """As `queries`, but padding points at a spare row behind the last one."""
    padding: Tensor | None
    """int64: which of the `queries` are padding; none: no padding."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All the blocks of one rank for one row."""

    causal: tuple[BlockBatch, ...]
    """Every local token is a query of exactly one of these; keys are the same local rows."""
    full: tuple[BlockBatch, ...]
    """Local queries against earlier keys of their document, in row order."""
    from_ranks: Tensor | None
    """int64 [s]: where each row position lies when the ranks' local tokens stand one after another."""
    to_ranks: Tensor | None
    """int64 [s]: its inverse, the row positions in rank order."""
    tokens: int
    """Local tokens."""


def build_schedule(layout: SequenceLayout, cp_rank: int, device: torch.device) -> Schedule:
    """The blocks of one context-parallel rank; index tensors on `device`."""
    spans = layout.spans(cp_rank)
    causal = [_causal_batch(group, layout.local_length, device) for group in _groups(spans)]
    shapes: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        if span.start:
            shapes.setdefault((span.stop - span.start, span.start), []).append(span)
    full = [_full_batch(group, layout, device) for group in shapes.values()]
    from_ranks = to_ranks = None
    if layout.cp > 1:
        rank, index = layout.owner
        from_ranks = torch.from_numpy(rank * layout.local_length + index).to(device)
        order = np.concatenate([layout.local_positions(one) for one in range(layout.cp)])
        to_ranks = torch.from_numpy(order).to(device)
    return Schedule(tuple(causal), tuple(full), from_ranks, to_ranks, layout.local_length)


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


def _causal_batch(spans: Sequence[Span], spare_row: int, device: torch.device) -> BlockBatch:
    lengths = [span.stop - span.start for span in spans]
    each = max(lengths)
    total = each * len(spans)
    if min(lengths) == each:
        rows = _rows([span.local_start for span in spans], each, device)
        return BlockBatch(len(spans), each, each, rows, rows, rows, None)
    starts = np.array([span.local_start for span in spans])[:, None]
    counts = np.array(lengths)[:, None]
    token = np.arange(each)[None, :]
    read = starts + np.minimum(token, counts - 1)
    pad = token >= counts
    read_rows = Rows(0, total, torch.from_numpy(read.reshape(-1)).to(device))
    write_rows = Rows(0, total, torch.from_numpy(np.where(pad, spare_row, read).reshape(-1)).to(device))
    padding = torch.from_numpy(np.flatnonzero(pad)).to(device)
    return BlockBatch(len(spans), each, each, read_rows, read_rows, write_rows, padding)


def _full_batch(spans: Sequence[Span], layout: SequenceLayout, device: torch.device) -> BlockBatch:
    queries, keys = spans[0].stop - spans[0].start, spans[0].start
    query_rows = _rows([span.local_start for span in spans], queries, device)
    key_rows = _rows([int(layout.starts[span.document]) for span in spans], keys, device)
    return BlockBatch(len(spans), queries, keys, query_rows, key_rows, query_rows, None)


def _rows(starts: Sequence[int], each: int, device: torch.device) -> Rows:
    """Rows of equal runs: a view where the runs touch."""
    if all(later - earlier == each for earlier, later in itertools.pairwise(starts)):
        return Rows(starts[0], each * len(starts))
    index = (np.array(starts)[:, None] + np.arange(each)).reshape(-1)
    return Rows(0, index.size, torch.from_numpy(index).to(device))
