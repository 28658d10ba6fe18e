"""Ownership of tokens and tiles across ranks: index arithmetic in numpy, without process groups or devices.

Tokens, labels, position ids, rotary tables, visual tokens and attention blocks are all indexed by this module, so they
cannot disagree. Every function is pure and returns the same result on every rank. Legend:

* *packed sequence*: the tokens of one forward pass, `s` of them: the packs of one micro-batch, concatenated.
* *document*: a contiguous range of the packed sequence inside which attention is causal (one sample or one pack; not a
  document of Megatron's indexed dataset).
* *global index*: index of a token in the packed sequence, 0..s-1. *Local index*: index among one rank's own tokens.
* *visual token*: one of the `tokens_per_tile` feature vectors of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_vita.errors import ConfigError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Tokens `[start, stop)` of one document, owned by one context-parallel rank and contiguous in its local tokens."""

    document: int
    """Index of the document in the packed sequence."""
    start: int
    """First token, counted from the document's start."""
    stop: int
    """One past the last token, counted from the document's start."""
    local_start: int
    """Local index of the first token."""


@dataclass(frozen=True)
class SequenceLayout:
    """Partition of one packed sequence over context-parallel (and sequence-parallel) ranks.

    Zigzag partition: each document is cut into 2*cp chunks, and rank r owns chunks r and 2*cp-1-r, because under causal
    attention a late token attends to more keys than an early one. Document lengths need not be divisible: the up to
    2*cp-1 remaining tokens of a document are assigned one by one to the ranks that own the fewest tokens so far, so
    that every rank owns exactly s/cp tokens after the last document.

    With document masking (data.reset_per_document) each sample is a document; without it each pack is one. Padding is
    always a document of its own.

    Raises:
        ConfigError: a document without tokens, or s is not a multiple of cp * sp.
    """

    documents: tuple[int, ...]
    """Length of each document in tokens, in order, all positive; their sum is s."""
    cp: int = 1
    """Context-parallel ranks."""
    sp: int = 1
    """Sequence-parallel ranks: tensor-parallel size with sequence parallelism, else 1."""

    def __post_init__(self) -> None:
        if not self.documents or min(self.documents) < 1:
            raise ConfigError(
                f"a packed sequence needs documents of at least one token each, got lengths {self.documents}"
            )
        if self.length % (self.cp * self.sp):
            raise ConfigError(
                f"a packed sequence of {self.length} tokens does not split over cp {self.cp} x sequence-parallel "
                f"{self.sp} ranks. Pad it to {-(-self.length // (self.cp * self.sp)) * self.cp * self.sp}."
            )

    @cached_property
    def length(self) -> int:
        """Tokens of the packed sequence, s."""
        return sum(self.documents)

    @property
    def local_length(self) -> int:
        """Tokens of each context-parallel rank, s/cp."""
        return self.length // self.cp

    @cached_property
    def starts(self) -> Int64:
        """Global index of each document's first token; int64 `[documents]`."""
        return np.concatenate([[0], np.cumsum(self.documents)[:-1]]).astype(np.int64)

    @cached_property
    def _all_spans(self) -> tuple[tuple[Span, ...], ...]:
        """Spans of every rank, in ascending order."""
        held = [0] * self.cp
        work = [0] * self.cp
        spans: list[list[Span]] = [[] for _ in range(self.cp)]
        for document, length in enumerate(self.documents):
            sizes = _chunk_sizes(length, self.cp, held, work)
            start = 0
            for chunk, size in enumerate(sizes):
                rank = min(chunk, 2 * self.cp - 1 - chunk)
                if size:
                    last = spans[rank][-1] if spans[rank] else None
                    if last and last.document == document and last.stop == start:  # the two middle chunks touch
                        spans[rank][-1] = Span(document, last.start, start + size, last.local_start)
                    else:
                        spans[rank].append(Span(document, start, start + size, held[rank]))
                    held[rank] += size
                    work[rank] += size * (2 * start + size + 1) // 2
                start += size
        return tuple(tuple(one) for one in spans)

    def spans(self, cp_rank: int) -> tuple[Span, ...]:
        """Contiguous ranges of documents that one context-parallel rank owns, in ascending order (its local order)."""
        return self._all_spans[cp_rank]

    def local_positions(self, cp_rank: int) -> Int64:
        """Global indices of the tokens that one context-parallel rank owns; int64 `[s/cp]`, ascending.

        Over all ranks these partition range(s). With sequence parallelism, tensor-parallel rank i owns the i-th of sp
        equal contiguous slices of them.
        """
        ranges = [
            np.arange(span.start, span.stop, dtype=np.int64) + self.starts[span.document]
            for span in self.spans(cp_rank)
        ]
        return np.concatenate(ranges)

    @cached_property
    def owner(self) -> tuple[Int64, Int64]:
        """(context-parallel rank, local index on it) of every token; two int64 `[s]`, indexed by global index."""
        rank = np.empty(self.length, dtype=np.int64)
        index = np.empty(self.length, dtype=np.int64)
        for cp_rank in range(self.cp):
            positions = self.local_positions(cp_rank)
            rank[positions] = cp_rank
            index[positions] = np.arange(len(positions))
        return rank, index

    @cached_property
    def positions_in_document(self) -> Int64:
        """Position id of every token inside its document; int64 `[s]`. Rotary tables are gathered by it."""
        return np.arange(self.length, dtype=np.int64) - np.repeat(self.starts, self.documents)

    def attention_work(self, cp_rank: int) -> int:
        """Unmasked query-key pairs of one context-parallel rank under causal attention within documents."""
        return sum((s.stop - s.start) * (s.start + s.stop + 1) // 2 for s in self.spans(cp_rank))


def most_tokens(length: int, cp: int, *, first: bool) -> int:
    """Most tokens that one context-parallel rank may own of a document.

    Args:
        length: tokens of the document.
        cp: context-parallel ranks.
        first: no document precedes it in the packed sequence; else ranks may own one token more or less before it.
    """
    base, rest = divmod(length, 2 * cp)
    return 2 * base - (-(rest + (0 if first else cp - 1)) // cp)


def _chunk_sizes(length: int, cp: int, held: Sequence[int], work: Sequence[int]) -> list[int]:
    """Sizes of a document's 2*cp chunks.

    Args:
        length: tokens of the document.
        cp: context-parallel ranks.
        held: tokens that each rank owns of earlier documents.
        work: query-key pairs that each rank has of earlier documents.
    """
    base, rest = divmod(length, 2 * cp)
    sizes = [base] * (2 * cp)
    held = [tokens + 2 * base for tokens in held]
    for _ in range(rest):
        rank = min(range(cp), key=lambda r: (held[r], work[r], r))
        early, late = rank, 2 * cp - 1 - rank
        # A rank with less work than the mean gets the token in its late chunk (more keys), else in its early chunk.
        late_first = work[rank] * cp <= sum(work)
        chunk = late if late_first == (sizes[late] == base) else early
        if sizes[chunk] > base:
            chunk = early if chunk == late else late
        sizes[chunk] += 1
        held[rank] += 1
    return sizes


@dataclass(frozen=True)
class TileRoutes:
    """Assignment of tiles to the encoding ranks of a tensor x context group, and destinations of their visual tokens.

    Group rank = cp_rank * tp + tp_rank (megatron-core's order: tp varies fastest). Each rank encodes a contiguous range
    of tiles, which differ by at most one tile, unless `encoders` names the ranks. Visual tokens are numbered
    `tile * tokens_per_tile + token`. A local index refers to the rank's tokens after the sequence-parallel split;
    without sequence parallelism it refers to the context-parallel rank's tokens, and all tp ranks receive the visual
    token.
    """

    layout: SequenceLayout
    first_token: Int64
    """Global index of each tile's first placeholder token; int64 `[tiles]`. The others of the tile follow it. Negative
    where the tile begins before the packed sequence."""
    tokens_per_tile: int
    tp: int = 1
    """Tensor-parallel ranks of the group."""
    encoders: Int64 | None = None
    """Group rank that holds each tile's visual tokens; int64 `[tiles]`. None: as `tiles_of` says."""
    cut_by: Int64 | None = None
    """Document of each tile, int64 `[tiles]`: only the visual tokens inside it are sent, because a chunk of a prompt
    may begin or end inside a tile. None: every tile lies inside its document."""

    @property
    def group_size(self) -> int:
        """Ranks that the tiles are assigned to, tp * cp."""
        return self.tp * self.layout.cp

    @property
    def num_tiles(self) -> int:
        """Tiles of the packed sequence."""
        return len(self.first_token)

    def tiles_of(self, group_rank: int) -> range:
        """Tiles that one rank encodes where `encoders` does not say: contiguous, as even as possible."""
        base, rest = divmod(self.num_tiles, self.group_size)
        start = group_rank * base + min(group_rank, rest)
        return range(start, start + base + (group_rank < rest))

    def _held(self, group_rank: int) -> Int64:
        """Tiles whose visual tokens one rank holds, ascending; int64 `[n]`."""
        if self.encoders is None:
            return np.array(self.tiles_of(group_rank), dtype=np.int64)
        return np.flatnonzero(self.encoders == group_rank).astype(np.int64)

    @cached_property
    def _token_owner(self) -> tuple[Int64, Int64]:
        """(cp rank, local index on it) of every visual token; two int64 `[tiles, tokens_per_tile]`; cp rank -1: nobody
        needs it."""
        positions = (self.first_token[:, None] + np.arange(self.tokens_per_tile)).astype(np.int64)
        rank, index = self.layout.owner
        if self.cut_by is None:
            return rank[positions], index[positions]
        start = self.layout.starts[self.cut_by][:, None]
        inside = (positions >= start) & (positions < start + np.array(self.layout.documents)[self.cut_by][:, None])
        positions = np.where(inside, positions, 0)
        return np.where(inside, rank[positions], -1), index[positions]

    def _between(self, source: int, target: int) -> tuple[Int64, Int64]:
        """Visual tokens that one group rank sends to another: (indices into the source's, local indices at the target).

        Two int64 arrays of equal length."""
        tiles = self._held(source)
        cp_rank, index = (array[tiles].reshape(-1) for array in self._token_owner)
        target_cp, target_tp = divmod(target, self.tp)
        owned = cp_rank == target_cp
        if self.layout.sp > 1:
            shard = self.layout.local_length // self.layout.sp
            owned &= index // shard == target_tp
            index = index % shard
        return np.flatnonzero(owned).astype(np.int64), index[owned]

    def send(self, group_rank: int) -> tuple[Int64, list[int]]:
        """Send side of the all-to-all for one group rank.

        Returns:
            int64 `[sent]`, indices into the rank's own visual tokens, ordered by target; and the count per target.
        """
        indices = [self._between(group_rank, target)[0] for target in range(self.group_size)]
        return np.concatenate(indices), [len(one) for one in indices]

    def receive(self, group_rank: int) -> tuple[Int64, list[int]]:
        """Receive side of the all-to-all for one group rank.

        Returns:
            int64 `[received]`, the local index of each received visual token, ordered by source; and the count per
            source.
        """
        indices = [self._between(source, group_rank)[1] for source in range(self.group_size)]
        return np.concatenate(indices), [len(one) for one in indices]
