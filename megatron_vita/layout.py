"""Who owns which token and which tile: pure index arithmetic, no process group, no device.

Tokens, labels, positions, rotary tables, tile features and attention are all indexed by the answers of this one
module, so they cannot drift apart. Legend: a *row* is what one forward pass sees, `s` tokens long; a *document* is a
span of the row inside which attention is causal (never an indexed-dataset document).
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
    """Tokens `[start, stop)` of one document, owned by one context-parallel rank and contiguous in its local row."""

    document: int
    """Index of the document in the row."""
    start: int
    """First token, counted from the document's start."""
    stop: int
    """One past the last token, counted from the document's start."""
    local_start: int
    """Where the span begins among the rank's local tokens."""


@dataclass(frozen=True)
class SequenceLayout:
    """How one row of documents is dealt over context-parallel (and sequence-parallel) ranks.

    Under causal attention a late token sees more keys than an early one. Each document is therefore cut into 2*cp
    chunks and rank r takes chunk r and its mirror image 2*cp-1-r: equal work everywhere. Lengths need not be
    divisible: the up to 2*cp-1 left-over tokens of a document go, one by one, to the ranks that hold the fewest
    tokens so far, so that after the last document every rank holds exactly s/cp.

    Without reset call it with one document for each pack of the row; padding is always a document of its own.
    """

    documents: tuple[int, ...]
    """Tokens of each document in row order, all positive; their sum is s."""
    cp: int = 1
    """Context-parallel ranks."""
    sp: int = 1
    """Sequence-parallel ranks: tensor-parallel size with sequence parallelism, else 1."""

    def __post_init__(self) -> None:
        if not self.documents or min(self.documents) < 1:
            raise ConfigError(f"a row needs documents of at least one token each, got lengths {self.documents}")
        if self.length % (self.cp * self.sp):
            raise ConfigError(
                f"a row of {self.length} tokens does not split over cp {self.cp} x sequence-parallel {self.sp} ranks. "
                f"Pad it to {-(-self.length // (self.cp * self.sp)) * self.cp * self.sp}."
            )

    @cached_property
    def length(self) -> int:
        """Tokens of the row, s."""
        return sum(self.documents)

    @property
    def local_length(self) -> int:
        """Tokens that each context-parallel rank owns, s/cp."""
        return self.length // self.cp

    @cached_property
    def starts(self) -> Int64:
        """Row position of each document's first token; int64 `[documents]`."""
        return np.concatenate([[0], np.cumsum(self.documents)[:-1]]).astype(np.int64)

    @cached_property
    def _all_spans(self) -> tuple[tuple[Span, ...], ...]:
        """Spans of every rank, in row order."""
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
        """The contiguous pieces of documents that one rank owns, in row order (which is its local order)."""
        return self._all_spans[cp_rank]

    def local_positions(self, cp_rank: int) -> Int64:
        """Row positions that one context-parallel rank owns; int64 `[s/cp]`, ascending.

        Over all ranks these partition range(s). With sequence parallelism the rank's sp-th equal run of them
        belongs to tensor-parallel rank sp.
        """
        pieces = [
            np.arange(span.start, span.stop, dtype=np.int64) + self.starts[span.document]
            for span in self.spans(cp_rank)
        ]
        return np.concatenate(pieces)

    @cached_property
    def owner(self) -> tuple[Int64, Int64]:
        """(context-parallel rank, index among its local tokens) of every row position; two int64 `[s]`."""
        rank = np.empty(self.length, dtype=np.int64)
        index = np.empty(self.length, dtype=np.int64)
        for cp_rank in range(self.cp):
            positions = self.local_positions(cp_rank)
            rank[positions] = cp_rank
            index[positions] = np.arange(len(positions))
        return rank, index

    @cached_property
    def positions_in_document(self) -> Int64:
        """Position of every row token inside its document; int64 `[s]`. Rotary tables are gathered by it."""
        return np.arange(self.length, dtype=np.int64) - np.repeat(self.starts, self.documents)

    def attention_work(self, cp_rank: int) -> int:
        """Query-key pairs that one rank computes under causal attention inside documents."""
        return sum((s.stop - s.start) * (s.start + s.stop + 1) // 2 for s in self.spans(cp_rank))


def _chunk_sizes(length: int, cp: int, held: Sequence[int], work: Sequence[int]) -> list[int]:
    """Sizes of a document's 2*cp chunks. `held` and `work` are what each rank has from earlier documents."""
    base, rest = divmod(length, 2 * cp)
    sizes = [base] * (2 * cp)
    held = [tokens + 2 * base for tokens in held]
    for _ in range(rest):
        rank = min(range(cp), key=lambda r: (held[r], work[r], r))
        early, late = rank, 2 * cp - 1 - rank
        # A rank with less work than the mean takes the token late (more keys), another one early.
        late_first = work[rank] * cp <= sum(work)
        chunk = late if late_first == (sizes[late] == base) else early
        if sizes[chunk] > base:
            chunk = early if chunk == late else late
        sizes[chunk] += 1
        held[rank] += 1
    return sizes


@dataclass(frozen=True)
class TileRoutes:
    """Which rank of a tensor x context parallel group encodes which tile, and where each feature row goes.

    The same on every rank of the group. Group rank = cp_rank * tp + tp_rank (megatron-core's order: tp runs fastest).
    Tiles are dealt in contiguous runs, to within one tile of even. A feature row is one context token of one tile; rows
    are numbered `tile * tokens_per_tile + token`. A local token index counts the rank's tokens after the
    sequence-parallel split, or the context-parallel rank's tokens where sequence parallelism is off: then all tp ranks
    receive the row.
    """

    layout: SequenceLayout
    first_token: Int64
    """Row position of each tile's first context token; int64 `[tiles]`. A tile's tokens are contiguous in the row."""
    tokens_per_tile: int
    tp: int = 1
    """Tensor-parallel ranks of the group."""

    @property
    def group_size(self) -> int:
        """Ranks that share the encoding work, tp * cp."""
        return self.tp * self.layout.cp

    @property
    def num_tiles(self) -> int:
        """Tiles of the row."""
        return len(self.first_token)

    def tiles_of(self, group_rank: int) -> range:
        """Tiles that one rank encodes."""
        base, rest = divmod(self.num_tiles, self.group_size)
        start = group_rank * base + min(group_rank, rest)
        return range(start, start + base + (group_rank < rest))

    @cached_property
    def _row_target(self) -> tuple[Int64, Int64]:
        """(cp rank, index among its local tokens) of every feature row; two int64 `[tiles * tokens_per_tile]`."""
        positions = (self.first_token[:, None] + np.arange(self.tokens_per_tile)).reshape(-1).astype(np.int64)
        rank, index = self.layout.owner
        return rank[positions], index[positions]

    def _between(self, source: int, target: int) -> tuple[Int64, Int64]:
        """(rows among the source's own feature rows, local indices at the target) for one pair of group ranks."""
        tiles = self.tiles_of(source)
        rows = np.arange(tiles.start * self.tokens_per_tile, tiles.stop * self.tokens_per_tile, dtype=np.int64)
        cp_rank, index = (array[rows] for array in self._row_target)
        target_cp, target_tp = divmod(target, self.tp)
        mine = cp_rank == target_cp
        if self.layout.sp > 1:
            shard = self.layout.local_length // self.layout.sp
            mine &= index // shard == target_tp
            index = index % shard
        return rows[mine] - tiles.start * self.tokens_per_tile, index[mine]

    def send(self, group_rank: int) -> tuple[Int64, list[int]]:
        """What a rank sends: indices into its own feature rows, ordered by target, and the count for each target."""
        rows = [self._between(group_rank, target)[0] for target in range(self.group_size)]
        return np.concatenate(rows), [len(one) for one in rows]

    def receive(self, group_rank: int) -> tuple[Int64, list[int]]:
        """What a rank gets: its local token index for each received row, ordered by source, and the count from each."""
        places = [self._between(source, group_rank)[1] for source in range(self.group_size)]
        return np.concatenate(places), [len(one) for one in places]
