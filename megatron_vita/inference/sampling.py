"""Sampling of a token from logits: pure functions, no global random state. Greedy is temperature 0.

Legend: n sequences, v vocabulary entries. A filter returns logits of the same shape in which what is ruled out is -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Settings of sampling."""

    temperature: float = 0.0
    """Divides the logits; 0: greedy."""
    top_k: int = 0
    """Choose among the k most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the fewest most likely tokens whose probabilities sum to at least this; 1: among all."""
    seed: int = 1234
    """Seeds every sequence alike, so that an answer does not depend on what is generated beside it."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 (no limit) or a positive number of tokens.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1].")


GREEDY = SamplingConfig()
"""Greedy decoding."""


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all but the k largest logits of each sequence; [n, v]. k = 0 or k >= v keeps all; ties stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Mask the tail of each sequence's distribution: keep the fewest most likely tokens whose sum reaches p; [n, v].

    The likeliest token always stays.
    """
    if p >= 1:
        return logits
    ordered, order = torch.sort(logits, dim=-1, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    before[..., 0] = 0  # rounding must not rule out the first
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, float("-inf"))


def distribution(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Probabilities that a token is drawn from; float32 [n, v], rows sum to 1. Needs temperature > 0.

    Temperature first, then top-k, then top-p of what is left: the order of Hugging Face's generate.
    """
    scaled = logits.float() / sampling.temperature
    return torch.softmax(keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p), dim=-1)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Turn one number in [0, 1) for each row into a token by inverting the cumulative distribution.

    Args:
        probabilities: [n, v], rows sum to 1 up to rounding.
        uniform: [n].

    Returns:
        int64 [n]; never a token of probability 0.
    """
    # In float64 because float32 sums of 150,000 terms drift by more than a rare token's share.
    total = torch.cumsum(probabilities.double(), dim=-1)
    target = uniform.to(total).unsqueeze(-1) * total[..., -1:]
    token = torch.searchsorted(total, target, right=True).squeeze(-1)
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)  # the last token that can be drawn at all
    return torch.minimum(token, last)


def choose(logits: torch.Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> torch.Tensor:
    """The next token of each sequence.

    Args:
        logits: [n, v].
        sampling: how to choose.
        generators: one for each sequence, on the CPU, advanced by one number; not touched when greedy.

    Returns:
        int64 [n].
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    uniform = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in generators])
    return draw(distribution(logits, sampling), uniform)


def generators_for(count: int, sampling: SamplingConfig) -> list[torch.Generator]:
    """One generator for each sequence, all seeded alike."""
    return [torch.Generator().manual_seed(sampling.seed) for _ in range(count)]
