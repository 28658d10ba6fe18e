"""The attention block schedule of one rank: computed once per packed sequence, used by all its layers.

A context-parallel rank owns spans of documents (`layout.Span`). Attention of a span is one diagonal block (causal,
against its own keys) and, unless the span starts its document, off-diagonal blocks (unmasked, against the document's
earlier keys). `cp_comm_type` decides which keys a step brings, hence how the off-diagonal blocks are cut:

* `all_gather`: one step with the keys of the whole packed sequence; one off-diagonal block per span.
* `p2p`: one step per rank of the ring, with that rank's keys. A block covers those of the document that precede the
  span, which are the first ones that rank owns of the document. Fully masked blocks are never scheduled.
* `a2a`: no off-diagonal blocks. A rank has all tokens for its slice of the heads, so every document is one span.

Blocks are views where possible: adjacent blocks of equal shape are one kernel call without a copy. Only where blocks
are so short that a kernel call costs more than copying them are they gathered first. On CPU, whose kernel takes blocks
of equal shape, short diagonal blocks are then padded to a common length, which adds at most `_WASTE` of the rank's
query-key pairs: padding comes last, so no real query attends to it, and its gradient is zeroed. On CUDA one
variable-length call takes blocks of any shapes: nothing is padded, and more off-diagonal blocks are gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita import kernels
from megatron_vita.layout import Int64, SequenceLayout, Span
from megatron_vita.parallel.block_kernels import Blocks
from megatron_vita.parallel.tables import TokenIndex, gather_tables

_COPIED_PER_CALL = 24
"""Tokens that can be copied, over all tensors of a forward and backward, in the time of one kernel call (measured on
CPU with 8 heads of size 64)."""
_PAD_BELOW = 512
"""Longest diagonal block, in tokens, that may be padded."""
_WASTE = 0.01
"""Query-key pairs that padding may add, as a fraction of the pairs of the rank's blocks."""
_SHORT_ON_CPU, _SHORT = 32, 4096
"""Off-diagonal blocks with at most this many queries and 4 times as many keys are gathered into one kernel call, on
CPU and on other devices. A longer block is a call of its own, on views."""
_MOST_ALONE = 3
"""On a GPU: of these, the blocks of a step that may be calls of their own. A call launches some 12 kernels each way."""


@dataclass(frozen=True, slots=True)
class DiagonalBlocks:
    """The diagonal blocks of a rank, and the permutation of its t tokens into block order (p places with padding)."""

    blocks: Blocks
    to_blocks: Tensor | None
    """int64 [p]: local index of the token at each place of the block order; padding repeats the last token of its
    block. None: block order is local order (then p == t)."""
    from_blocks: Tensor | None
    """int64 [t]: place of each local token in the block order; None with `to_blocks`."""
    padding: Tensor | None
    """int64: places of the block order that are padding; None: no padding."""

    def partition(self, tokens: Tensor) -> Tensor:
        """[t, ...] in local order -> [p, ...] in block order."""
        return tokens if self.to_blocks is None else tokens.index_select(0, self.to_blocks)

    def collect(self, partitioned: Tensor) -> Tensor:
        """[p, ...] in block order -> [t, ...] in local order, padding dropped."""
        return partitioned if self.from_blocks is None else partitioned.index_select(0, self.from_blocks)


@dataclass(frozen=True, slots=True)
class OffDiagonalBlocks:
    """Unmasked blocks of one kernel call."""

    blocks: Blocks
    queries: TokenIndex
    """The blocks' queries among this rank's t tokens."""
    keys: TokenIndex
    """The blocks' keys among the keys of the step."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All attention blocks of one context-parallel rank for one packed sequence."""

    comm_type: str
    """`p2p`, `all_gather` or `a2a`; always `all_gather` with one context-parallel rank."""
    diagonal: DiagonalBlocks
    steps: tuple[tuple[OffDiagonalBlocks, ...], ...]
    """Off-diagonal blocks of each communication step; no step under `a2a` or with one context-parallel rank."""
    tokens: int
    """Tokens of this rank, t."""
    rank_order_index: Tensor | None
    """int64 [s]: place of each token (by global index) when the ranks' local tokens are concatenated in rank order.
    None under `p2p` and with one rank, which never assemble the packed sequence."""
    sequence_order_index: Tensor | None
    """int64 [s]: the inverse, global indices in rank order; None with `rank_order_index`."""

    def to_sequence_order(self, by_rank: Tensor) -> Tensor:
        """[s, ...] concatenated in rank order -> [s, ...] by global index."""
        assert self.rank_order_index is not None
        return by_rank.index_select(0, self.rank_order_index)

    def to_rank_order(self, by_position: Tensor) -> Tensor:
        """[s, ...] by global index -> [s, ...] concatenated in rank order."""
        assert self.sequence_order_index is not None
        return by_position.index_select(0, self.sequence_order_index)

    @property
    def pairs(self) -> int:
        """Query-key pairs that this rank's kernels compute per head, padding included."""
        return self.diagonal.blocks.pairs + sum(one.blocks.pairs for step in self.steps for one in step)


def build_schedule(
    layout: SequenceLayout, cp_rank: int, device: torch.device, comm_type: str = "all_gather"
) -> Schedule:
    """Compute the block schedule of one context-parallel rank and move it to the device. No communication.

    Args:
        layout: partition of the packed sequence.
        cp_rank: the rank whose blocks are computed.
        device: where attention runs and the index tensors are put.
        comm_type: `p2p`, `all_gather` or `a2a`; no difference with one context-parallel rank.
    """
    return gather_tables(host_schedule(layout, cp_rank, device, comm_type)).to(device)


def host_schedule(layout: SequenceLayout, cp_rank: int, device: torch.device, comm_type: str) -> Schedule:
    """`build_schedule` with the index tensors on the CPU; `device` decides the shapes of the kernel calls alone."""
    comm_type = comm_type if layout.cp > 1 else "all_gather"
    whole = comm_type == "a2a" or layout.cp == 1
    spans = SequenceLayout(layout.documents).spans(0) if whole else layout.spans(cp_rank)
    sources: list[Int64] = []
    if not whole and comm_type == "p2p":
        sources = [layout.local_positions((cp_rank - step) % layout.cp) for step in range(layout.cp)]
    elif not whole:
        sources = [np.arange(layout.length)]
    rank_order_index = sequence_order_index = None
    if layout.cp > 1 and comm_type != "p2p":
        rank, index = layout.owner
        rank_order_index = torch.from_numpy(rank * layout.local_length + index)
        order = np.concatenate([layout.local_positions(one) for one in range(layout.cp)])
        sequence_order_index = torch.from_numpy(order)
    return Schedule(
        comm_type=comm_type,
        diagonal=_diagonal_blocks(spans, device),
        steps=tuple(_off_diagonal_blocks(_segments(spans, layout.starts, source), device) for source in sources),
        tokens=layout.local_length,
        rank_order_index=rank_order_index,
        sequence_order_index=sequence_order_index,
    )


def _diagonal_blocks(spans: Sequence[Span], device: torch.device) -> DiagonalBlocks:
    lengths = [span.stop - span.start for span in spans]
    runs = [(len(list(equal)), length, length) for length, equal in itertools.groupby(lengths)]
    groups = [] if kernels.on(device).variable_length else _groups(spans)
    if not groups or sum(lengths) >= _COPIED_PER_CALL * (len(runs) - len(groups)):
        return DiagonalBlocks(_blocks(runs, True, device), None, None, None)
    return _padded_blocks(groups, device)


def _padded_blocks(groups: Sequence[Sequence[Span]], device: torch.device) -> DiagonalBlocks:
    """Diagonal blocks in which the spans of each group are padded to the longest of the group: one run per group."""
    runs, orders, pads = [], [], []
    for group in groups:
        lengths = np.array([span.stop - span.start for span in group])[:, None]
        starts = np.array([span.local_start for span in group])[:, None]
        each = int(lengths.max())
        token = np.arange(each)[None, :]
        orders.append((starts + np.minimum(token, lengths - 1)).reshape(-1))
        pads.append((token >= lengths).reshape(-1))
        runs.append((len(group), each, each))
    to_blocks, pad = np.concatenate(orders), np.concatenate(pads)
    from_blocks = np.empty(len(to_blocks) - int(pad.sum()), dtype=np.int64)
    from_blocks[to_blocks[~pad]] = np.flatnonzero(~pad)
    padding = torch.from_numpy(np.flatnonzero(pad)) if pad.any() else None
    index = torch.from_numpy(to_blocks), torch.from_numpy(from_blocks)
    return DiagonalBlocks(_blocks(runs, True, device), *index, padding)


def _groups(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans whose diagonal blocks share a kernel call: the coarsest groups whose padding stays within _WASTE."""
    needed = sum((one.stop - one.start) * (one.stop + one.start + 1) // 2 for one in spans)
    own = sum(_triangle(one.stop - one.start) for one in spans)
    ordered = sorted(spans, key=lambda one: one.start - one.stop)  # longest first; stable among equal lengths
    for slack in (8, 16, 32, 64, 128):
        groups = _groups_within(ordered, slack)
        padded = sum(len(group) * _triangle(max(one.stop - one.start for one in group)) for group in groups)
        if padded - own <= _WASTE * needed:
            return groups
    return _groups_within(ordered, None)


def _groups_within(ordered: Sequence[Span], slack: int | None) -> list[list[Span]]:
    """Group spans (longest first) whose lengths differ by at most 1/slack of the longest (None: equal lengths only)."""
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


def _segments(spans: Sequence[Span], starts: Int64, source: Int64) -> Int64:
    """Off-diagonal blocks of spans against the keys of one step, `source` (global indices, ascending).

    Returns:
        int64 `[blocks, 4]`: first query (local index), number of queries, first key (index into `source`), number of
        keys; ascending by query.
    """
    own = np.array([(one.document, one.start, one.stop - one.start, one.local_start) for one in spans], dtype=np.int64)
    begins = starts[own[:, 0]]
    first = np.searchsorted(source, begins)
    keys = np.searchsorted(source, begins + own[:, 1]) - first
    found = np.stack([own[:, 3], own[:, 2], first, keys], axis=1)[keys > 0]
    merged: list[Int64] = []
    for one in found:  # both spans of a document may attend to the same keys: merged into one block
        last = merged[-1] if merged else None
        if last is not None and last[0] + last[1] == one[0] and (last[2:] == one[2:]).all():
            last[1] += one[1]
        else:
            merged.append(one.copy())
    return np.array(merged, dtype=np.int64).reshape(-1, 4)


def _off_diagonal_blocks(segments: Int64, device: torch.device) -> tuple[OffDiagonalBlocks, ...]:
    any_shapes = kernels.on(device).variable_length
    short = _SHORT if any_shapes else _SHORT_ON_CPU
    alone = (segments[:, 1] > short) | (segments[:, 3] > 4 * short)
    if any_shapes:
        alone[np.argsort(-segments[:, 1] * alone, kind="stable")[_MOST_ALONE:]] = False
    few = [_one_call(one[None], device) for one in segments[alone]]
    rest = segments[~alone]
    return (*few, _one_call(rest, device)) if len(rest) else tuple(few)


def _one_call(segments: Int64, device: torch.device) -> OffDiagonalBlocks:
    shapes, kind = np.unique(segments[:, [1, 3]], axis=0, return_inverse=True)
    changes = np.flatnonzero(np.diff(kind.reshape(-1))) + 1
    if len(changes) >= len(shapes) and not kernels.on(device).variable_length:
        # Blocks of equal shape are not adjacent: sort by shape. (Else adjacent queries stay views.)
        segments = segments[np.argsort(kind.reshape(-1), kind="stable")]
        changes = np.flatnonzero((np.diff(segments[:, [1, 3]], axis=0) != 0).any(axis=1)) + 1
    runs = [(len(run), int(run[0, 1]), int(run[0, 3])) for run in np.split(segments, changes)]
    queries, keys = (_token_index(segments[:, side], segments[:, side + 1]) for side in (0, 2))
    return OffDiagonalBlocks(_blocks(runs, False, device), queries, keys)


def _token_index(starts: Int64, counts: Int64) -> TokenIndex:
    """Index of consecutive ranges: a contiguous range where each starts at the end of the previous one."""
    total = int(counts.sum())
    if np.array_equal(starts[1:], (starts + counts)[:-1]):
        return TokenIndex(int(starts[0]), total)
    index = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(total)
    return TokenIndex(0, total, torch.from_numpy(index))


def _blocks(runs: Sequence[tuple[int, int, int]], causal: bool, device: torch.device) -> Blocks:
    bounds = None
    if kernels.on(device).variable_length:
        each = np.repeat([run[1:] for run in runs], [run[0] for run in runs], axis=0)
        ends = torch.from_numpy(np.concatenate([[[0, 0]], each.cumsum(axis=0)]).astype(np.int32))
        bounds = ends[:, 0], ends[:, 1]
    return Blocks(tuple(runs), causal, bounds)
