"""Which blocks of attention one rank computes for a row: index arithmetic, done once per row for all its layers.

A rank owns spans of documents. Each span is one diagonal block (its own keys) and, unless it starts its document, sees
all the document's keys before it (off-diagonal blocks). How these keys arrive decides how they are cut:

* `all_gather`: one step, against the keys of the whole row: one off-diagonal block a span.
* `p2p`: one step a rank of the ring, against that rank's keys: those of the document that come before the span, which
  are the first ones of that rank's run. Nothing to see, no block: no block is ever masked in full.
* `a2a`: no off-diagonal blocks. The rank has the whole row for some of its heads, so a span is a document.

Blocks are read where they lie: neighbours of equal shape go through one call, as a view. Only where blocks are so short
that a call costs more than copying them are they brought together first, and short causal ones padded to equal shape,
within `_WASTE` of the rank's work: no real query sees padding at the end, and padding sends no gradient. (Off the CPU
one call takes blocks of any shape: more off-diagonal blocks are brought together, and nothing is padded.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_vita.layout import SequenceLayout, Span
from megatron_vita.parallel.block_kernels import Blocks

_COPIED_PER_CALL = 24
"""Tokens that are copied through all tensors of a forward and backward in the time of one more call (CPU, measured at 8
heads of 64)."""
_PAD_BELOW = 512
"""Longest diagonal block that may be padded."""
_WASTE = 0.01
"""Query-key pairs that padding may add, as a share of the pairs that the rank's blocks need."""
_SHORT_ON_CPU, _SHORT = 32, 4096
"""Full blocks with at most so many queries, and 4 times as many keys, are gathered into few calls; longer ones are
calls of their own, on views. Where one call takes blocks of any shape, more are worth gathering."""

Int64 = npt.NDArray[np.int64]


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
        """Add `values` to those rows of `target`; a row that is listed twice gets both."""
        if self.index is None:
            target.narrow(0, self.start, self.count).add_(values)
        else:
            target.index_add_(0, self.index, values.to(target.dtype))


@dataclass(frozen=True, slots=True)
class DiagonalBlocks:
    """Every token of the rank, once, partitioned into runs of equal diagonal blocks that stand one after another."""

    blocks: Blocks
    read: Tensor | None
    """int64 [partitioned]: the token that stands at each place; padding repeats the last token of its block. None: the
    tokens as they are."""
    place: Tensor | None
    """int64 [t]: where each token stands."""
    padding: Tensor | None
    """int64: the places that are padding; none: no padding."""

    def partition(self, rows: Tensor) -> Tensor:
        """[t, ...] -> [partitioned, ...]."""
        return rows if self.read is None else rows.index_select(0, self.read)

    def collect(self, partitioned: Tensor) -> Tensor:
        """[partitioned, ...] -> [t, ...], in the order of the tokens."""
        return partitioned if self.place is None else partitioned.index_select(0, self.place)


@dataclass(frozen=True, slots=True)
class OffDiagonalBlocks:
    """Blocks without a mask that go through the kernels together."""

    blocks: Blocks
    queries: Rows
    """Rows among this rank's tokens."""
    keys: Rows
    """Rows among the keys of the step."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All the blocks of one rank for one row."""

    comm_type: str
    diagonal: DiagonalBlocks
    steps: tuple[tuple[OffDiagonalBlocks, ...], ...]
    """What is computed against the keys of each step; no step where keys do not travel (a2a, and one rank)."""
    tokens: int
    """Tokens that this rank owns, t."""
    from_ranks: Tensor | None
    """int64 [s]: where each row position lies when the ranks' tokens stand one after another."""
    to_ranks: Tensor | None
    """int64 [s]: its inverse, the row positions in rank order. Both only where a row is put together."""

    def to_row_order(self, by_rank: Tensor) -> Tensor:
        """[s, ...] in rank order -> in row order."""
        assert self.from_ranks is not None
        return by_rank.index_select(0, self.from_ranks)

    def to_rank_order(self, row: Tensor) -> Tensor:
        """[s, ...] in row order -> in rank order."""
        assert self.to_ranks is not None
        return row.index_select(0, self.to_ranks)

    @property
    def pairs(self) -> int:
        """Query-key pairs that this rank's kernels compute for each head it has, padding included."""
        return self.diagonal.blocks.pairs + sum(one.blocks.pairs for step in self.steps for one in step)


def build_schedule(
    layout: SequenceLayout, cp_rank: int, device: torch.device, comm_type: str = "all_gather"
) -> Schedule:
    """The blocks of one context-parallel rank; index tensors on `device`.

    Args:
        layout: the row.
        cp_rank: whose blocks.
        device: where attention runs.
        comm_type: `p2p`, `all_gather` or `a2a`; with one context-parallel rank they are the same.
    """
    comm_type = comm_type if layout.cp > 1 else "all_gather"
    whole = comm_type == "a2a" or layout.cp == 1
    spans = SequenceLayout(layout.documents).spans(0) if whole else layout.spans(cp_rank)
    sources: list[Int64] = []
    if not whole and comm_type == "p2p":
        sources = [layout.local_positions((cp_rank - step) % layout.cp) for step in range(layout.cp)]
    elif not whole:
        sources = [np.arange(layout.length)]
    from_ranks = to_ranks = None
    if layout.cp > 1 and comm_type != "p2p":
        rank, index = layout.owner
        from_ranks = torch.from_numpy(rank * layout.local_length + index).to(device)
        order = np.concatenate([layout.local_positions(one) for one in range(layout.cp)])
        to_ranks = torch.from_numpy(order).to(device)
    return Schedule(
        comm_type=comm_type,
        diagonal=_diagonal_blocks(spans, device),
        steps=tuple(_full_blocks(_segments(spans, layout.starts, source), device) for source in sources),
        tokens=layout.local_length,
        from_ranks=from_ranks,
        to_ranks=to_ranks,
    )


# ---- diagonal blocks ----


def _diagonal_blocks(spans: Sequence[Span], device: torch.device) -> DiagonalBlocks:
    lengths = [span.stop - span.start for span in spans]
    runs = [(len(list(equal)), length, length) for length, equal in itertools.groupby(lengths)]
    groups = _groups(spans) if device.type == "cpu" else []
    if not groups or sum(lengths) >= _COPIED_PER_CALL * (len(runs) - len(groups)):
        return DiagonalBlocks(_blocks(runs, True, device), None, None, None)
    return _dealt_blocks(groups, device)


def _dealt_blocks(groups: Sequence[Sequence[Span]], device: torch.device) -> DiagonalBlocks:
    """The spans of each group padded to equal length, in one run."""
    runs, reads, pads = [], [], []
    for group in groups:
        lengths = np.array([span.stop - span.start for span in group])[:, None]
        starts = np.array([span.local_start for span in group])[:, None]
        each = int(lengths.max())
        token = np.arange(each)[None, :]
        reads.append((starts + np.minimum(token, lengths - 1)).reshape(-1))
        pads.append((token >= lengths).reshape(-1))
        runs.append((len(group), each, each))
    read, pad = np.concatenate(reads), np.concatenate(pads)
    place = np.empty(len(read) - int(pad.sum()), dtype=np.int64)
    place[read[~pad]] = np.flatnonzero(~pad)
    padding = torch.from_numpy(np.flatnonzero(pad)).to(device) if pad.any() else None
    index = torch.from_numpy(read).to(device), torch.from_numpy(place).to(device)
    return DiagonalBlocks(_blocks(runs, True, device), *index, padding)


def _groups(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans whose diagonal blocks share a call: as unequal as the allowance for padding permits."""
    needed = sum((one.stop - one.start) * (one.stop + one.start + 1) // 2 for one in spans)
    own = sum(_triangle(one.stop - one.start) for one in spans)
    ordered = sorted(spans, key=lambda one: one.start - one.stop)  # longest first, row order among equals
    for slack in (8, 16, 32, 64, 128):
        groups = _groups_within(ordered, slack)
        padded = sum(len(group) * _triangle(max(one.stop - one.start for one in group)) for group in groups)
        if padded - own <= _WASTE * needed:
            return groups
    return _groups_within(ordered, None)


def _groups_within(ordered: Sequence[Span], slack: int | None) -> list[list[Span]]:
    """Spans in groups whose lengths differ by at most 1/slack of the longest (none: not at all)."""
    groups: list[list[Span]] = []
    longest = allowed = 0
    for span in ordered:
        length = span.stop - span.start
        if groups and longest - length <= allowed:
            groups[-1].append(span)
        else:
            groups.append([span])
            longest = length
            allowed = -(-longest // slack) if slack and longest <= _PAD_BELOW else 0
    return [sorted(group, key=lambda one: one.local_start) for group in groups]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


# ---- off-diagonal blocks ----


def _segments(spans: Sequence[Span], starts: Int64, source: Int64) -> Int64:
    """The off-diagonal blocks of spans against keys at the (ascending) row positions `source`.

    Returns:
        int64 `[blocks, 4]`: first query row, queries, first key row, keys; in the order of the queries.
    """
    own = np.array([(one.document, one.start, one.stop - one.start, one.local_start) for one in spans], dtype=np.int64)
    begins = starts[own[:, 0]]
    first = np.searchsorted(source, begins)
    keys = np.searchsorted(source, begins + own[:, 1]) - first
    found = np.stack([own[:, 3], own[:, 2], first, keys], axis=1)[keys > 0]
    merged: list[Int64] = []
    for one in found:  # both spans of a document see the same keys of a rank that lies between: one block
        last = merged[-1] if merged else None
        if last is not None and last[0] + last[1] == one[0] and (last[2:] == one[2:]).all():
            last[1] += one[1]
        else:
            merged.append(one.copy())
    return np.array(merged, dtype=np.int64).reshape(-1, 4)


def _full_blocks(segments: Int64, device: torch.device) -> tuple[OffDiagonalBlocks, ...]:
    short = _SHORT_ON_CPU if device.type == "cpu" else _SHORT
    alone = (segments[:, 1] > short) | (segments[:, 3] > 4 * short)
    few = [_one_call(one[None], device) for one in segments[alone]]
    rest = segments[~alone]
    return (*few, _one_call(rest, device)) if len(rest) else tuple(few)


def _one_call(segments: Int64, device: torch.device) -> OffDiagonalBlocks:
    shapes, kind = np.unique(segments[:, [1, 3]], axis=0, return_inverse=True)
    changes = np.flatnonzero(np.diff(kind.reshape(-1))) + 1
    if len(changes) >= len(shapes):  # equal shapes apart: bring them together
        segments = segments[np.argsort(kind.reshape(-1), kind="stable")]
        changes = np.flatnonzero((np.diff(segments[:, [1, 3]], axis=0) != 0).any(axis=1)) + 1
    runs = [(len(run), int(run[0, 1]), int(run[0, 3])) for run in np.split(segments, changes)]
    rows = (_rows(segments[:, 0], segments[:, 1], device), _rows(segments[:, 2], segments[:, 3], device))
    return OffDiagonalBlocks(_blocks(runs, False, device), *rows)


def _rows(starts: Int64, counts: Int64, device: torch.device) -> Rows:
    """Rows of runs: a view where each begins where the one before ends."""
    total = int(counts.sum())
    if np.array_equal(starts[1:], (starts + counts)[:-1]):
        return Rows(int(starts[0]), total)
    index = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(total)
    return Rows(0, total, torch.from_numpy(index).to(device))


def _blocks(runs: Sequence[tuple[int, int, int]], causal: bool, device: torch.device) -> Blocks:
    bounds = None
    if device.type != "cpu":
        each = np.repeat([run[1:] for run in runs], [run[0] for run in runs], axis=0)
        ends = torch.from_numpy(np.concatenate([[[0, 0]], each.cumsum(axis=0)]).astype(np.int32)).to(device)
        bounds = ends[:, 0].contiguous(), ends[:, 1].contiguous()
    return Blocks(tuple(runs), causal, bounds)
