"""Sampling of tokens from logits, without global random state. Greedy is temperature 0.

The order is that of vLLM's V1 sampler (vllm/v1/sample/sampler.py): logit bias, repetition penalty, frequency and
presence penalty, tokens masked that the guide forbids and end tokens up to `min_tokens`, temperature, min-p, top-k,
top-p. The formulas of repetition
penalty, temperature, min-p, top-k and top-p are those of transformers (generation/logits_process.py), whose `generate`
applies min-p after top-p instead; frequency and presence penalty are OpenAI's: only generated tokens count.

A sequence draws the same tokens whatever else is in the batch: every operation on floating-point numbers is elementwise
and exact, or works on one row at a time; the draw is made in float64.

Legend: n sequences, m of them concerned, v vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_vita.inference.guide import Guide
from megatron_vita.inference.logprobs import prompt_logprobs
from megatron_vita.inference.sampling_config import GREEDY, MAX_LOGPROBS, SamplingConfig

__all__ = [
    "GREEDY",
    "Sampled",
    "SamplingConfig",
    "SequenceSampler",
    "distribution",
    "draw",
    "prompt_logprobs",
    "sample",
]
_HEAD = 1024
"""Most likely tokens among which top-p looks first."""


class Sampled(NamedTuple):
    """A token that was chosen."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability, if asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the most likely tokens, most likely first."""
    complete: bool = False
    """Its guide lets nothing follow it."""
    error: str | None = None
    """Why there is no token: its guide could not go on."""


class SequenceSampler:
    """What sampling has to remember of one sequence."""

    __slots__ = ("_tokens", "config", "ends", "generator", "guide", "history", "plain")

    def __init__(
        self,
        config: SamplingConfig,
        prompt_ids: Sequence[int],
        vocab_size: int,
        end_ids: frozenset[int],
        guide: Guide | None = None,
    ) -> None:
        """
        Args:
            config: how to choose.
            prompt_ids: tokens of the prompt, below `vocab_size`.
            vocab_size: v, the width of the logits.
            end_ids: the model's own end tokens.
            guide: of `config.guide`.

        Raises:
            ConfigError: see `SamplingConfig.check_vocabulary`.
        """
        config.check_vocabulary(vocab_size)
        self.config = config
        self.guide = guide
        self.ends = frozenset(config.stop_token_ids) | (frozenset() if config.ignore_eos else end_ids)
        """Tokens that end the answer."""
        self.generator = torch.Generator().manual_seed(config.seed) if config.temperature > 0 else None
        self.history: torch.Tensor | None = None
        """float32 [2, v]: 1 for tokens of prompt and answer; counts of the answer's tokens. For penalties only."""
        if config.penalises:
            self.history = torch.zeros(2, vocab_size)
            self.history[0, torch.as_tensor(prompt_ids, dtype=torch.int64)] = 1
        self._tokens = 0
        self.plain = self._is_plain()
        """The next token is the one with the largest logit, and nothing else is asked for."""

    @property
    def ends_masked(self) -> bool:
        """The answer is too short to end."""
        return self._tokens < self.config.min_tokens

    def _is_plain(self) -> bool:
        config = self.config
        changed = config.penalises or config.logit_bias or self.ends_masked or self.guide is not None
        return not changed and config.temperature == 0 and config.logprobs is None

    def observe(self, token: int) -> None:
        """Count a token of the answer."""
        self._tokens += 1
        if self.guide is not None:
            self.guide.accept(token)
        if not self.plain:
            self.plain = self._is_plain()
            if self.history is not None:
                self.history[0, token] = 1
                self.history[1, token] += 1


def sample(logits: torch.Tensor, samplers: Sequence[SequenceSampler]) -> list[Sampled]:
    """Choose the next token of each sequence, and let its sampler observe it.

    Args:
        logits: float [n, v], on any device.
        samplers: one for each row.

    Returns:
        n tokens. Log-probabilities are those of the logits as given, before bias, penalties and temperature (the
        default of vLLM V1, `raw_logprobs`); float32.
    """
    if all(sampler.plain for sampler in samplers):
        sampled = [Sampled(token) for token in logits.argmax(dim=-1).tolist()]
    else:
        adjusted = _adjust(logits, samplers)
        chosen = adjusted.argmax(dim=-1)
        drawing = [row for row, sampler in enumerate(samplers) if sampler.generator is not None]
        if drawing:
            generators = [samplers[row].generator for row in drawing]
            uniform = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in generators])
            weights = distribution(adjusted[drawing], [samplers[row].config for row in drawing])
            chosen[drawing] = draw(weights, uniform)
        sampled = [Sampled(token) for token in chosen.tolist()]
        reported = [row for row, sampler in enumerate(samplers) if sampler.config.logprobs is not None]
        if reported:
            values, top_ids, top_values = (
                part.tolist() for part in prompt_logprobs(logits[reported], chosen[reported], MAX_LOGPROBS)
            )
            for place, row in enumerate(reported):
                top = tuple(zip(top_ids[place], top_values[place], strict=True))[: samplers[row].config.logprobs]
                sampled[row] = Sampled(sampled[row].token, values[place], top)
    for row, sampler in enumerate(samplers):
        if sampler.guide is None or sampler.guide.error is None:
            sampler.observe(sampled[row].token)
        if (guide := sampler.guide) is not None:
            sampled[row] = sampled[row]._replace(complete=guide.complete, error=guide.error)
    return sampled


def _adjust(logits: torch.Tensor, samplers: Sequence[SequenceSampler]) -> torch.Tensor:
    """Logits [n, v], at least float32, with bias and penalties, and masked: see `_mask`."""
    device = logits.device
    out = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    biases = [(row, *bias) for row, sampler in enumerate(samplers) for bias in sampler.config.logit_bias]
    if biases:
        places, ids, values = zip(*biases, strict=True)
        out[places, ids] += torch.tensor(values, dtype=out.dtype, device=device)
    penalised = [(row, sampler) for row, sampler in enumerate(samplers) if sampler.history is not None]
    if penalised:
        histories = []
        for _, sampler in penalised:
            assert sampler.history is not None
            sampler.history = sampler.history.to(device)  # and it stays there
            histories.append(sampler.history)
        seen, counts = torch.stack(histories, dim=1).unbind()
        rows = [row for row, _ in penalised]
        part = out[rows]
        repetition, frequency, presence = (
            torch.tensor([[getattr(one.config, name)] for _, one in penalised], dtype=part.dtype, device=device)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        repeated = torch.where(part < 0, part * repetition, part / repetition)
        part = torch.where(seen > 0, repeated, part)
        out[rows] = part - frequency * counts - presence * (counts > 0)
    _mask(out, samplers)
    return out


def _mask(logits: torch.Tensor, samplers: Sequence[SequenceSampler]) -> None:
    """Rule out, in place, what guides forbid, and end tokens that come too early, unless nothing else may come."""
    guided = [(row, one.guide) for row, one in enumerate(samplers) if one.guide is not None]
    only_ends: set[int] = set()
    if guided:
        rows = [row for row, _ in guided]
        allowed = Guide.allowed([guide for _, guide in guided], logits.shape[-1], logits.device)
        logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))
        for place, row in enumerate(rows):
            if samplers[row].ends_masked:
                ends = allowed[place, sorted(samplers[row].ends)].sum()
                only_ends |= {row} if bool(ends == allowed[place].sum()) else set()
    masked = [
        (row, one)
        for row, sampler in enumerate(samplers)
        if sampler.ends_masked and row not in only_ends
        for one in sampler.ends
    ]
    if masked:
        places, ids = zip(*masked, strict=True)
        logits[places, ids] = float("-inf")


def distribution(logits: torch.Tensor, configs: Sequence[SamplingConfig]) -> torch.Tensor:
    """What tokens are drawn by, up to a factor for each row: temperature, then min-p, top-k and top-p.

    Args:
        logits: float [m, v].
        configs: one for each row, all of temperature > 0.

    Returns:
        float64 [m, v]; 0 where a token is ruled out.
    """
    temperature = torch.tensor([[one.temperature] for one in configs], dtype=torch.float64, device=logits.device)
    scaled = logits.double()
    # the largest logit becomes 0 first: no temperature, however small, makes it infinite
    probabilities = torch.softmax((scaled - scaled.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    filtering = [row for row, one in enumerate(configs) if one.filters]
    if filtering:
        probabilities[filtering] = _filter(probabilities[filtering], [configs[row] for row in filtering])
    return probabilities


def _filter(probabilities: torch.Tensor, configs: Sequence[SamplingConfig]) -> torch.Tensor:
    """Probabilities float64 [m, v], with 0 where min-p, top-k or top-p rules a token out."""
    size = probabilities.shape[-1]
    top_p, min_p, top_k = (
        torch.tensor(values, dtype=dtype, device=probabilities.device).unsqueeze(-1)
        for values, dtype in (
            ([one.top_p for one in configs], torch.float64),
            ([one.min_p for one in configs], torch.float64),
            ([min(one.top_k, size) for one in configs], torch.int64),
        )
    )
    largest = probabilities.amax(dim=-1, keepdim=True)
    floor = min_p * largest
    if most := int(top_k.max()):
        kth = torch.topk(probabilities, most).values.gather(-1, (top_k - 1).clamp(min=0))
        floor = torch.maximum(floor, torch.where(top_k > 0, kth, 0))
    probabilities = torch.where(probabilities >= floor, probabilities, 0)
    if all(one.top_p == 1 for one in configs):
        return probabilities
    target = torch.where(top_p < 1, top_p * probabilities.cumsum(dim=-1)[:, -1:], 0)
    width = min(size, _HEAD)  # only as many as are needed are sorted
    while True:
        head = torch.topk(probabilities, width).values
        sums = head.cumsum(dim=-1)
        if width == size or bool((sums[:, -1:] >= target).all()):
            break
        width = min(size, 8 * width)
    last = (sums < target).sum(dim=-1, keepdim=True).clamp(max=width - 1)  # the token that reaches p stays
    smallest = head.gather(-1, last)
    # of tokens that are alike at the border the first ones stay, whatever order topk gave them
    room = last + 1 - (head > smallest).sum(dim=-1, keepdim=True)
    alike = probabilities == smallest
    keep = (probabilities > smallest) | (alike & (alike.cumsum(dim=-1) <= room)) | (top_p == 1)
    return torch.where(keep, probabilities, 0)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Turn one number in [0, 1) for each row into a token by inverting the cumulative distribution.

    Args:
        weights: [n, v], at least 0; probabilities up to a factor for each row.
        uniform: float64 [n].

    Returns:
        int64 [n]; never a token of weight 0.
    """
    # In float64 because float32 sums of 150,000 terms drift by more than a rare token's share.
    total = torch.cumsum(weights.double(), dim=-1)
    target = uniform.to(total).unsqueeze(-1) * total[..., -1:]
    last = torch.searchsorted(total, total[..., -1:].contiguous())  # the last token that adds to the sum
    token = torch.minimum(torch.searchsorted(total, target, right=True), last)
    return token.clamp(max=weights.shape[-1] - 1).squeeze(-1)  # v where weights are NaN
