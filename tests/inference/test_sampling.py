"""Properties of sampling that hold for any logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_vita.errors import ConfigError
from megatron_vita.inference.sampling import (
    GREEDY,
    SamplingConfig,
    choose,
    distribution,
    draw,
    generators_for,
    keep_top_k,
    keep_top_p,
)

LOGITS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-20, 20, width=32)
).map(torch.from_numpy)


@settings(deadline=None)
@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_the_largest(logits: torch.Tensor, k: int) -> None:
    kept = torch.isfinite(keep_top_k(logits, k))
    for row, mask in zip(logits, kept, strict=True):
        assert mask.sum() >= min(k, len(row))
        if not mask.all():
            assert row[mask].min() > row[~mask].max()  # ties stay together, so the two sides never touch
            assert (row > row[mask].min()).sum() < k


@settings(deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits: torch.Tensor, p: float) -> None:
    filtered = keep_top_p(logits, p)
    probabilities = torch.softmax(logits.double(), -1)
    for row, mask in zip(probabilities, torch.isfinite(filtered), strict=True):
        assert mask[row.argmax()] or row[mask].max() == row.max()
        assert row[mask].sum() >= p - 1e-5
        if mask.sum() > 1:
            assert row[mask].sum() - row[mask].min() < p + 1e-5
        if not mask.all():
            assert row[mask].min() >= row[~mask].max()


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 5), st.integers(0, 12), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_a_drawn_token_is_allowed_and_repeats_with_its_seed(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    probabilities = distribution(logits, sampling)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(logits)))
    tokens = choose(logits, sampling, generators_for(len(logits), sampling))
    assert (probabilities.gather(-1, tokens[:, None]) > 0).all()
    assert torch.equal(tokens, choose(logits, sampling, generators_for(len(logits), sampling)))
    # each row alone gives what it gave in company
    alone = [choose(row[None], sampling, generators_for(1, sampling)) for row in logits]
    assert torch.equal(torch.cat(alone), tokens)


@settings(deadline=None)
@given(LOGITS)
def test_greedy_and_the_limits_agree(logits: torch.Tensor) -> None:
    greedy = choose(logits, GREEDY, [])
    assert torch.equal(greedy, logits.argmax(-1))
    cold = SamplingConfig(temperature=1.0, top_k=1)
    tokens = choose(logits, cold, generators_for(len(logits), cold))
    assert torch.equal(logits.gather(-1, tokens[:, None]), logits.gather(-1, greedy[:, None]))


def test_draws_follow_the_distribution() -> None:
    wanted = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    count = 30_000
    uniform = (torch.arange(count) + 0.5) / count
    drawn = torch.bincount(draw(wanted.expand(count, -1), uniform), minlength=6) / count
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    edges = draw(wanted.expand(2, -1), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edges.tolist() == [1, 4], "not even the ends of [0, 1] reach a token of probability 0"


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
