"""Which sequences take part in the next step, and with how many tokens (continuous batching).

A step carries one token of every sequence that decodes, and chunks of prompts with what is left of the token budget.
Sequences come and go between steps; nobody waits for the longest. A sequence is admitted when the cache has room for
all of its tokens so far that it does not share. If the cache is full when an answer grows, the youngest sequence gives
its blocks back and is computed again later. Every rank runs the same scheduler on the same requests, so all agree
without communication.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_vita.inference.blocks import BlockManager
from megatron_vita.inference.prefix_cache import Key, PrefixCache
from megatron_vita.inference.sequence import Sequence
from megatron_vita.layout import SequenceLayout, most_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, stop)` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """The step gives the sequence's next token."""
        return self.stop == len(self.sequence)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one forward pass."""

    chunks: tuple[Chunk, ...]
    decodes: tuple[Sequence, ...]
    slots: tuple[int | None, ...]
    """Of each decoding sequence's token, on the context rank that owns it; else None."""

    def layout(self, ranks: int) -> SequenceLayout | None:
        """The packed sequence of the chunks, a document each, with padding that makes it divide over the ranks."""
        if not self.chunks:
            return None
        lengths = [chunk.stop - chunk.start for chunk in self.chunks]
        padding = -sum(lengths) % ranks
        return SequenceLayout((*lengths, padding) if padding else tuple(lengths), ranks)


class Scheduler:
    """Queues of sequences that wait and that run."""

    def __init__(self, blocks: BlockManager, *, budget: int, max_num_seqs: int) -> None:
        """No sequence waits.

        Args:
            blocks: of the cache.
            budget: tokens of a step over all context ranks, at least one a rank. Decoding goes first; a prompt then
                gets at least a token a rank.
            max_num_seqs: sequences that run at once.
        """
        self.blocks = blocks
        self.budget = budget
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first."""
        self.preemptions = 0
        """Sequences that gave their blocks back, so far."""
        self._promised = 0  # blocks of each rank that the chunks chosen so far may take

    @property
    def busy(self) -> bool:
        """A sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn. Its tokens must fit the empty cache (`BlockManager.capacity`)."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or given up."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.free(sequence.table)
        else:
            self.waiting.remove(sequence)

    def preempt(self) -> Sequence:
        """Take the blocks of the youngest running sequence back; it waits first in line, and is computed again."""
        youngest = self.running.pop()
        self.blocks.free(youngest.table)
        youngest.computed = youngest.shared = 0
        youngest.keys = ()  # a shared prefix may lie on one rank only, which is what fills the cache
        self.waiting.appendleft(youngest)
        self.preemptions += 1
        return youngest

    def plan(self) -> StepPlan:
        """Choose the next step's tokens; gives decoding sequences their slots, and admits who waits."""
        self._promised = 0
        slots: dict[Sequence, int | None] = {}
        for sequence in list(self.running):
            if sequence.decoding and sequence in self.running and self._make_room(sequence):
                slots[sequence] = self.blocks.add_decoded(sequence.table)
        budget = max(self.budget - len(slots), self.blocks.ranks)
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if budget and sequence in self.running and not sequence.decoding:
                budget -= self._add_chunk(sequence, budget, chunks)
        while self.waiting and budget and len(self.running) < self.max_num_seqs and self._admissible(self.waiting[0]):
            if self._being_computed(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            if isinstance(self.blocks, PrefixCache) and sequence.keys:
                sequence.computed = sequence.shared = self.blocks.share(sequence.table, self._shareable(sequence))
            used = self._add_chunk(sequence, budget, chunks)
            if not used:
                break
            budget -= used
        running = set(self.running)
        decodes = [sequence for sequence in slots if sequence in running]
        return StepPlan(
            tuple(chunk for chunk in chunks if chunk.sequence in running),
            tuple(decodes),
            tuple(slots[sequence] for sequence in decodes),
        )

    def _add_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Append the sequence's next chunk, if the budget and the cache have room; the number of its tokens."""
        start, left = sequence.computed, len(sequence) - sequence.computed
        count = min(left, budget)
        ranks = self.blocks.ranks
        aligned = 2 * ranks * self.blocks.block_size  # every rank gets two spans of whole blocks
        if count < left or isinstance(self.blocks, PrefixCache):
            # Uneven shares add up over many chunks. With a prefix cache the rest of a prompt is a chunk of its own.
            unit = next((unit for unit in (aligned, 2 * ranks) if count >= unit), ranks)
            if count < left and unit == ranks and chunks:
                return 0  # fewer than 2 * ranks tokens are assigned evenly only at the beginning of a packed sequence
            count -= count % unit if count < left or unit == aligned else 0
        most = most_tokens(count, ranks, first=not chunks)
        if not self._make_room(sequence, most):
            return 0
        self._promised += self.blocks.most_missing(sequence.table, most)
        chunks.append(Chunk(sequence, start, start + count))
        return count

    def _admissible(self, sequence: Sequence) -> bool:
        """The cache has room for all tokens of a waiting sequence, beside the prompts that are not complete yet."""
        if not self.running:
            return True
        incomplete = sum(
            self.blocks.most_missing(one.table, -(-(len(one) - one.computed) // self.blocks.ranks) + 1)
            for one in self.running
            if not one.decoding
        )
        if self.blocks.most_blocks(len(sequence)) <= self.blocks.free_blocks() - incomplete:
            return True
        if not isinstance(self.blocks, PrefixCache) or not sequence.keys:
            return False
        shared, free = self.blocks.beside_shared(self._shareable(sequence))
        return self.blocks.most_blocks(len(sequence) - shared) <= free - incomplete

    def _shareable(self, sequence: Sequence) -> tuple[Key, ...]:
        """Keys of the blocks that a sequence may share: the last token's logits are needed, so it is computed."""
        return sequence.keys[: (len(sequence) - 1) // self.blocks.block_size]

    def _being_computed(self, sequence: Sequence) -> bool:
        """True if a running prompt is about to compute blocks that this sequence could share after the step."""
        if not isinstance(self.blocks, PrefixCache) or not sequence.keys:
            return False
        known = self.blocks.shareable(sequence.keys)
        return known < len(self._shareable(sequence)) and any(
            known < len(one.keys) and one.keys[known] == sequence.keys[known] and not one.decoding
            for one in self.running
        )

    def _make_room(self, sequence: Sequence, tokens: int | None = None) -> bool:
        """Preempt the youngest sequences until this one has room for so many tokens on every rank (None: one decoded
        token); False if it is preempted itself."""
        while not self._has_room(sequence, tokens):
            if self.preempt() is sequence:
                return False
        return True

    def _has_room(self, sequence: Sequence, tokens: int | None) -> bool:
        if tokens is None:
            return self.blocks.fits_decoded(sequence.table)
        return self.blocks.most_missing(sequence.table, tokens) <= self.blocks.free_blocks() - self._promised
