"""Schedulers, block tables and batches of all context ranks, without a model: every slot remembers what was written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence as Sized
from typing import Any

import numpy as np
import torch

from megatron_vita.data.example import Example
from megatron_vita.inference.batch import StepBatch, build_batch
from megatron_vita.inference.blocks import BlockManager
from megatron_vita.inference.prefix_cache import PrefixCache, block_keys
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling import GREEDY
from megatron_vita.inference.scheduler import Scheduler
from megatron_vita.inference.sequence import Sequence
from megatron_vita.parallel.kv_cache import KVCache
from tests.inference.tiny import question

CPU = torch.device("cpu")
SAMPLE = question("the")


@dataclasses.dataclass
class Rank:
    """One rank's books and its cache."""

    blocks: BlockManager
    scheduler: Scheduler
    cache: KVCache
    cells: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """Slot -> digest of the tokens up to the one whose keys and values it holds."""
    sequences: list[Sequence] = dataclasses.field(default_factory=list)

    def read(self, runs: Sized[tuple[int, int]]) -> list[bytes]:
        """What attention reads."""
        return [self.cells[slot] for first, count in runs for slot in range(first, first + count)]


class Books:
    """All context ranks of an engine; `step` is a step of the engine, in which every claim about it is checked."""

    def __init__(
        self,
        *,
        ranks: int,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int = 256,
        prefix: bool = False,
    ) -> None:
        manager = PrefixCache if prefix else BlockManager
        self.size, self.prefix, self.budget, self.number = block_size, prefix, budget, ranks
        self.ranks = []
        for rank in range(ranks):
            blocks = manager(num_blocks=num_blocks, block_size=block_size, ranks=ranks, rank=rank)
            cache = KVCache(
                [1], num_blocks=num_blocks, block_size=block_size, groups=1, head_dim=1, dtype=torch.float32, device=CPU
            )
            self.ranks.append(Rank(blocks, Scheduler(blocks, budget=budget, max_num_seqs=max_num_seqs), cache))
        self.steps = 0
        self.idle = False
        self.written = 0
        self.largest_gap = 0
        """Most tokens by which two ranks' shares of one sequence differed."""

    def add(self, prompt: Sized[int], limit: int) -> int:
        """Let a sequence wait on every rank; its number."""
        tokens = np.array(prompt, dtype=np.int32)
        keys = tuple(block_keys(tokens, self.size, (), (), 4)) if self.prefix else ()
        number = len(self.ranks[0].sequences)
        for rank in self.ranks:
            request = Request(str(number), SAMPLE, GREEDY)
            example = Example(tokens, np.full_like(tokens, -100))
            rank.sequences.append(Sequence(number, request, example, limit, rank.blocks.table(), keys))
            rank.scheduler.add(rank.sequences[-1])
        return number

    def abort(self, number: int) -> None:
        for rank in self.ranks:
            if rank.sequences[number] in [*rank.scheduler.running, *rank.scheduler.waiting]:
                rank.scheduler.remove(rank.sequences[number])

    @property
    def busy(self) -> bool:
        return self.ranks[0].scheduler.busy

    def step(self) -> None:
        """Plan, write, read and append on every rank."""
        plans = [rank.scheduler.plan() for rank in self.ranks]
        said = [
            ([(one.sequence.number, one.start, one.stop) for one in plan.chunks], [one.number for one in plan.decodes])
            for plan in plans
        ]
        assert all(one == said[0] for one in said), "ranks plan different steps"
        idle = not plans[0].chunks and not plans[0].decodes
        assert not (idle and self.idle), "two steps without work"
        self.idle, self.steps = idle, self.steps + 1
        if idle:  # the only sequence has given back blocks that it shared, of which one rank had too many
            assert self.prefix
            return
        numbers = [one[0] for one in said[0][0]] + said[0][1]
        assert len(set(numbers)) == len(numbers)
        tokens = sum(stop - start for _, start, stop in said[0][0])
        assert tokens <= max(self.budget - len(said[0][1]), self.number), "more tokens than the budget"
        scheduler = self.ranks[0].scheduler
        order = [one.number for one in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order), "first come, first served"
        batches = [
            build_batch(plan, rank.blocks, rank.cache, CPU) for plan, rank in zip(plans, self.ranks, strict=True)
        ]
        for rank, batch in zip(self.ranks, batches, strict=True):
            self._write(rank, batch)
        self._read(batches)
        for rank, batch in zip(self.ranks, batches, strict=True):
            self._append(rank, batch)
        self._count()

    def _write(self, rank: Rank, batch: StepBatch) -> None:
        """Each row of the batch is the token that it should be, and goes to a slot of its own."""
        owners: list[tuple[Sequence, int] | None] = []
        if batch.layout is not None:
            for index in batch.layout.local_positions(rank.blocks.rank).tolist():
                document = int(np.searchsorted(batch.layout.starts, index, side="right")) - 1
                if document < len(batch.plan.chunks):
                    chunk = batch.plan.chunks[document]
                    owners.append((chunk.sequence, chunk.start + index - int(batch.layout.starts[document])))
                else:
                    owners.append(None)
        assert len(owners) == batch.step.prefill_tokens
        for (owner, index), chunk in zip(batch.ends, [one for one in batch.plan.chunks if one.last], strict=True):
            assert owner != rank.blocks.rank or owners[index] == (chunk.sequence, len(chunk.sequence) - 1)
        owners += [(sequence, len(sequence) - 1) for sequence in batch.plan.decodes]
        for row, owned in enumerate(owners):
            if owned is not None:
                sequence, place = owned
                assert int(batch.tokens[0, row]) == sequence.ids(place, place + 1)[0]
                assert int(batch.positions[0, row]) == place
        rows = list(range(len(owners))) if batch.step.rows is None else batch.step.rows.tolist()
        slots = batch.step.slots.tolist()
        assert len(rows) == len(slots)
        assert len(set(slots)) == len(slots)
        wanted = [row for row, one in enumerate(owners[: batch.step.prefill_tokens]) if one is not None]
        assert [row for row in rows if row < batch.step.prefill_tokens] == wanted, "each token of a chunk is written"
        for row, slot in zip(rows, slots, strict=True):
            written = owners[row]
            assert written is not None, "padding is written nowhere"
            rank.cells[slot] = content(written[0], written[1])
        self.written += len(slots)

    def _read(self, batches: Sized[StepBatch]) -> None:
        """Attention finds each earlier token of a sequence once, on one of the ranks."""
        plan = batches[0].plan
        later = [chunk for chunk in plan.chunks if chunk.start]
        assert all(len(batch.step.prefixes) == len(later) for batch in batches)
        for number, chunk in enumerate(later):
            parts = [rank.read(b.step.prefixes[number].runs) for rank, b in zip(self.ranks, batches, strict=True)]
            assert list(batches[0].step.prefixes[number].tokens) == [len(part) for part in parts]
            _same(parts, chunk.sequence, chunk.start)
        for number, sequence in enumerate(plan.decodes):
            tables = [batch.plan.decodes[number].table for batch in batches]
            parts = [rank.read(table.runs) for rank, table in zip(self.ranks, tables, strict=True)]
            _same(parts, sequence, len(sequence))

    def _append(self, rank: Rank, batch: StepBatch) -> None:
        """As Worker does."""
        for chunk in batch.plan.chunks:
            chunk.sequence.computed = chunk.stop
        for sequence in batch.plan.decodes:
            sequence.computed += 1
        for sequence in batch.sampled:
            sequence.generated.append((7 * sequence.number + 3 * len(sequence)) % 1000)
            if len(sequence.generated) >= sequence.limit:
                rank.scheduler.remove(sequence)

    def _count(self) -> None:
        """Free and used blocks are all blocks; a block of two tables is shared."""
        for at, rank in enumerate(self.ranks):
            held = [block for one in rank.sequences for block in one.table.blocks[at]]
            available = rank.blocks._available(at)
            assert available == rank.blocks.num_blocks - len(set(held))
            assert self.prefix or len(set(held)) == len(held), "a block belongs to two sequences"
            assert [one.table.tokens for one in rank.sequences] == [one.table.tokens for one in self.ranks[0].sequences]
        for sequence in self.ranks[0].scheduler.running:
            assert sum(sequence.table.tokens) == sequence.computed
            self.largest_gap = max(self.largest_gap, max(sequence.table.tokens) - min(sequence.table.tokens))


def content(sequence: Sequence, place: int) -> bytes:
    """Digest of a sequence's tokens up to one."""
    return hashlib.blake2b(sequence.ids(0, place + 1).tobytes(), digest_size=8).digest()


def _same(parts: Sized[Sized[bytes]], sequence: Sequence, length: int) -> None:
    found = sorted(cell for part in parts for cell in part)
    assert found == sorted(content(sequence, place) for place in range(length)), "tokens lost, doubled or another's"


def run(books: Books, arrivals: Sized[tuple[int, Sized[int], int]], aborted: dict[int, int] | None = None) -> Any:
    """Run until all are answered: (step, prompt, limit) in the order of steps; aborted: number -> step."""
    waiting = list(reversed(arrivals))
    limits = [limit for _, _, limit in arrivals]
    work = sum(len(prompt) + limit for _, prompt, limit in arrivals)
    while waiting or books.busy:
        while waiting and (waiting[-1][0] <= books.steps or not books.busy):
            books.add(*waiting.pop()[1:])
        for number, step in (aborted or {}).items():
            if step == books.steps and number < len(books.ranks[0].sequences):
                books.abort(number)
        if books.busy:
            books.step()
        assert books.steps <= 20 * work, "no end"
    for rank in books.ranks:
        assert rank.blocks.free_blocks() == rank.blocks.num_blocks, "every block is given back"
        for number, sequence in enumerate(rank.sequences):
            assert number in (aborted or {}) or len(sequence.generated) == limits[number]
