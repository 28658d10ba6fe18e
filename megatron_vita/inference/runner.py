"""One step of the model on this rank: receive, compute, send on, choose tokens.

Pipeline stages compute a step one after the other. On the last one only the rows that are asked for reach the
vocabulary product (`masked`, the logits-masked head of Long-VITA); `chunked` and `full` compute the logits of all rows,
for comparison. Legend: t local tokens, n sequences that get a token, h decoder width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vita.inference.batch import StepBatch
from megatron_vita.inference.guide import Guides
from megatron_vita.inference.prompt import TokenLogprob
from megatron_vita.inference.sampling import Sampled, SequenceSampler, prompt_logprobs, sample
from megatron_vita.inference.scheduler import Chunk
from megatron_vita.inference.sequence import Sequence
from megatron_vita.inference.world import World
from megatron_vita.layout import TileRoutes
from megatron_vita.models.cached_forward import CachedForward
from megatron_vita.models.vita import VitaModel
from megatron_vita.parallel.collectives import receive_from_previous, reduce_, send_to_next

HEAD_ROWS = 1024
"""Rows of one vocabulary product in the `chunked` head and for log-probabilities of prompts."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives, the same on every rank."""

    tokens: list[int]
    """One for each of the batch's `sampled`."""
    details: list[Sampled] | None
    """With log-probabilities or what guides say, where a sequence asks for them."""
    prompts: dict[int, list[TokenLogprob]]
    """Log-probabilities of the tokens that follow a chunk's tokens, by number of the sequence."""


class ModelRunner:
    """Runs steps on this rank. All ranks call its methods in the same order."""

    def __init__(self, model: VitaModel, world: World, guides: Guides, *, lm_head: str) -> None:
        """Run a model.

        Args:
            model: this rank's pipeline stage.
            world: all ranks.
            guides: make what guides an answer.
            lm_head: `masked`, `chunked` or `full`.
        """
        self.model = model
        self.world = world
        self._compute = CachedForward(model)
        self._groups = model.groups
        self.guides = guides
        self._head = lm_head
        self._samplers: dict[int, SequenceSampler] = {}

    def add(self, sequence: Sequence, ends: frozenset[int]) -> None:
        """Remember how a new sequence's tokens are chosen."""
        if self.world.samples:
            config, vocab_size = sequence.request.sampling, self.model.model.vocab_size
            guide = None if config.guide is None else self.guides.begin(config.guide)
            self._samplers[sequence.number] = SequenceSampler(config, sequence.prompt.tolist(), vocab_size, ends, guide)

    def forget(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or given up."""
        self._samplers.pop(sequence.number, None)

    @torch.inference_mode()
    def run(self, batch: StepBatch, visual: tuple[Tensor, TileRoutes] | None) -> StepResult:
        """Compute a step.

        Args:
            batch: this rank's tensors.
            visual: visual tokens that this rank holds, on the first stage.
        """
        hidden = self._forward(batch, visual)
        prompts: dict[int, list[TokenLogprob]] = {}
        chosen: list[Sampled] | None = None
        if hidden is not None:
            prompts = self._prompt_logprobs(hidden, batch)
            if batch.sampled:
                chosen = self._sample(hidden, batch)
        tokens: list[int] = []
        if batch.sampled:
            tokens = self.world.tokens([one.token for one in chosen] if chosen else None, len(batch.sampled))
        configs = [sequence.request.sampling for sequence in batch.sampled]
        told = any(config.logprobs is not None or config.guide is not None for config in configs)
        if told or any(_asks_for_prompt(chunk) for chunk in batch.plan.chunks):
            chosen, prompts = self.world.details((chosen, prompts))
        return StepResult(tokens, chosen if told else None, prompts)

    def _forward(self, batch: StepBatch, visual: tuple[Tensor, TileRoutes] | None) -> Tensor | None:
        """Hidden states [t, h] on the last stage; None on the others."""
        group = self._groups.collection.pp
        received = None
        if not self._groups.first_stage:
            like = torch.empty(0, dtype=self.model.config.params_dtype, device=batch.tokens.device)
            shape = (batch.tokens.shape[1], 1, self.model.config.hidden_size)
            received = receive_from_previous(shape, like, group)
        hidden = self._compute(
            tokens=batch.tokens,
            positions=batch.positions,
            layout=batch.layout,
            step=batch.step,
            visual=visual,
            received=received,
        )
        if self._groups.last_stage:
            return hidden.squeeze(1)
        send_to_next(hidden, group)
        return None

    def _sample(self, hidden: Tensor, batch: StepBatch) -> list[Sampled] | None:
        """The next tokens, on the rank that samples; last stage only."""
        rank, chunk_tokens = self._groups.cp_rank, batch.step.prefill_tokens
        own = [(number, index) for number, (owner, index) in enumerate(batch.ends) if owner == rank]
        decoded = len(batch.sampled) - len(batch.ends)
        index = torch.tensor(
            [index for _, index in own] + list(range(chunk_tokens, chunk_tokens + decoded)),
            dtype=torch.int64,
            device=hidden.device,
        )
        if self._head != "masked":
            rows = self._all_logits(hidden, index)
        else:
            rows = hidden if len(index) == len(hidden) else hidden.index_select(0, index)
        if batch.ends and self._groups.cp_size > 1:
            # The last token of a prompt is on one context rank: the others add zeros, which is exact.
            ends = rows.new_zeros(len(batch.ends), rows.shape[1])
            ends[[number for number, _ in own]] = rows[: len(own)]
            reduce_(ends, self._groups.collection.cp)
            rows = torch.cat([ends, rows[len(own) :]])
        if rank:
            return None
        logits = self.model.logits(rows) if self._head == "masked" else rows
        if not self.world.samples:
            return None
        return self.choose(logits, batch.sampled)

    def choose(self, logits: Tensor, sequences: tuple[Sequence, ...]) -> list[Sampled]:
        """The next tokens of sequences, from logits [n, v]; on the rank that samples."""
        return sample(logits, [self._samplers[sequence.number] for sequence in sequences])

    def _all_logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Logits [k, v] of the rows `index` [k] of all t rows, every one of which is computed."""
        if self._head == "full":
            return self.model.logits(hidden).index_select(0, index)
        kept = hidden.new_empty(len(index), self.model.model.vocab_size)
        for start in range(0, len(hidden), HEAD_ROWS):
            logits = self.model.logits(hidden[start : start + HEAD_ROWS])
            inside = (index >= start) & (index < start + len(logits))
            kept[inside] = logits[index[inside] - start]
            del logits  # before the next ones are computed
        return kept

    def _prompt_logprobs(self, hidden: Tensor, batch: StepBatch) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that follow the chunks' tokens; last stage only."""
        found: dict[int, list[TokenLogprob]] = {}
        for document, chunk in enumerate(batch.plan.chunks):
            if not _asks_for_prompt(chunk):
                continue
            assert batch.layout is not None, "chunks have a layout"
            top = chunk.sequence.request.sampling.prompt_logprobs or 0
            stop = min(chunk.stop, len(chunk.sequence.prompt) - 1)  # nothing of the prompt follows its last token
            if stop <= chunk.start:
                continue
            # Every row on its place, zeros from the other ranks: value, ids, values of the most likely.
            table = torch.zeros(stop - chunk.start, 1 + 2 * top, dtype=torch.float64, device=hidden.device)
            targets = torch.from_numpy(chunk.sequence.ids(chunk.start + 1, stop + 1)).to(hidden.device)
            for span in batch.layout.spans(self._groups.cp_rank):
                if span.document != document:
                    continue
                for first in range(span.start, min(span.stop, stop - chunk.start), HEAD_ROWS):
                    last = min(first + HEAD_ROWS, span.stop, stop - chunk.start)
                    place = span.local_start + first - span.start
                    logits = self.model.logits(hidden[place : place + last - first])
                    parts = prompt_logprobs(logits, targets[first:last], top)
                    table[first:last] = torch.cat([part.double().reshape(last - first, -1) for part in parts], dim=1)
            reduce_(table, self._groups.collection.cp)
            found[chunk.sequence.number] = [_entry(row, target, top) for row, target in zip(
                table.tolist(), targets.tolist(), strict=True
            )]  # fmt: skip
        return found


def _asks_for_prompt(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return sequence.request.sampling.prompt_logprobs is not None and not sequence.generated


def _entry(row: list[Any], target: int, top: int) -> TokenLogprob:
    ids, values = row[1 : 1 + top], row[1 + top :]
    return TokenLogprob(target, row[0], tuple((int(one), value) for one, value in zip(ids, values, strict=True)))
