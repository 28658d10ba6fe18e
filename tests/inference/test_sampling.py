"""Properties of sampling that hold for any logits, and agreement with stock transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_vita.errors import ConfigError
from megatron_vita.inference import sampling
from megatron_vita.inference.sampling import (
    GREEDY,
    Sampled,
    SamplingConfig,
    SequenceSampler,
    distribution,
    draw,
    prompt_logprobs,
    sample,
)

LOGITS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-20, 20, width=16)
).map(torch.from_numpy)
V = 33
"""Vocabulary of tests of whole sequences; odd, so that rows begin at any alignment."""
TOKENS = st.integers(0, V - 1)
CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0, 0.5, 1.0, 30.0]),
    top_k=st.sampled_from([0, 0, 1, 5, V, 2 * V]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.25]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 0.25, 3.0]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    seed=st.integers(0, 99),
    stop_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 6),
    logprobs=st.sampled_from([None, None, 0, 3, 20]),
)


@pytest.fixture(autouse=True, scope="module")
def _short_head() -> Iterator[None]:
    """Few tokens are many here: top-p has to look beyond those that it sorts first."""
    with patch.object(sampling, "_HEAD", 2):
        yield


def softmax(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The distribution that one configuration draws from; rows sum to 1."""
    weights = distribution(logits, [config] * len(logits))
    return weights / weights.sum(-1, keepdim=True)


@settings(deadline=None)
@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_the_largest(logits: torch.Tensor, k: int) -> None:
    kept = softmax(logits, SamplingConfig(temperature=1.0, top_k=k)) > 0
    for row, mask in zip(logits, kept, strict=True):
        assert mask.sum() >= min(k, len(row))
        if not mask.all():
            assert row[mask].min() > row[~mask].max()  # ties stay together, so the two sides never touch
            assert (row > row[mask].min()).sum() < k


@settings(deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits: torch.Tensor, p: float) -> None:
    kept = softmax(logits, SamplingConfig(temperature=1.0, top_p=p)) > 0
    probabilities = torch.softmax(logits.double(), -1)
    for row, mask in zip(probabilities, kept, strict=True):
        assert mask[row.argmax()] or row[mask].max() == row.max()
        assert row[mask].sum() >= p - 1e-12
        if mask.sum() > 1:
            assert row[mask].sum() - row[mask].min() < p + 1e-12
        if not mask.all():
            assert row[mask].min() >= row[~mask].max()


def test_the_first_of_equal_tokens_stay() -> None:
    kept = softmax(torch.zeros(1, 10), SamplingConfig(temperature=1.0, top_p=0.35)) > 0
    assert kept.tolist() == [[True] * 4 + [False] * 6]
    exact = softmax(torch.zeros(1, 8), SamplingConfig(temperature=1.0, top_p=0.5)) > 0
    assert exact.tolist() == [[True] * 4 + [False] * 4]


@settings(deadline=None)
@given(LOGITS, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough(logits: torch.Tensor, p: float) -> None:
    kept = softmax(logits, SamplingConfig(temperature=1.0, min_p=p)) > 0
    ratio = torch.softmax(logits.double(), -1)
    ratio = ratio / ratio.amax(-1, keepdim=True)
    assert kept[ratio > p + 1e-12].all()
    assert not kept[ratio < p - 1e-12].any()


@settings(deadline=None)
@given(LOGITS, st.floats(1e-300, 1e300), st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0))
def test_a_drawn_token_is_allowed(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed % (1 << 63))
    weights = distribution(logits, [config] * len(logits))
    assert torch.isfinite(weights).all()
    samplers = [SequenceSampler(config, (), logits.shape[-1], frozenset()) for _ in logits]
    tokens = torch.tensor([one.token for one in sample(logits, samplers)])
    assert (weights.gather(-1, tokens[:, None]) > 0).all()


@settings(deadline=None)
@given(LOGITS)
def test_greedy_and_the_limits_agree(logits: torch.Tensor) -> None:
    def choose(config: SamplingConfig) -> torch.Tensor:
        samplers = [SequenceSampler(config, (), logits.shape[-1], frozenset()) for _ in logits]
        return logits.gather(-1, torch.tensor([[one.token] for one in sample(logits, samplers)]))

    best = logits.amax(-1, keepdim=True)
    likeliest = SamplingConfig(temperature=1.0, min_p=1.0)
    for limit in (GREEDY, SamplingConfig(temperature=1.0, top_k=1), SamplingConfig(temperature=1e-300), likeliest):
        torch.testing.assert_close(choose(limit), best, rtol=0, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    wanted = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    count = 30_000
    uniform = (torch.arange(count) + 0.5) / count
    drawn = torch.bincount(draw(wanted.expand(count, -1), uniform), minlength=6) / count
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    edges = draw(wanted.expand(2, -1), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edges.tolist() == [1, 4], "not even the ends of [0, 1] reach a token of probability 0"


class Sequence:
    """A sequence with logits of its own for every step."""

    def __init__(self, config: SamplingConfig, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = (4 * torch.randn(8, V, generator=generator)).round(decimals=1).to(dtype)  # with ties
        self.sampler = SequenceSampler(config, [seed % V, 3], V, frozenset({5}))
        self.sampled: list[Sampled] = []


@settings(deadline=None)
@given(
    st.lists(st.tuples(CONFIGS, st.integers(0, 1000)), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.data(),
)
def test_companions_change_no_bit(
    members: list[tuple[SamplingConfig, int]], dtype: torch.dtype, data: st.DataObject
) -> None:
    company = [Sequence(*member, dtype) for member in members]
    going = company
    while going:
        batch = data.draw(st.permutations(going))[: data.draw(st.integers(1, len(going)))]
        logits = torch.stack([one.logits[len(one.sampled)] for one in batch])
        before = logits.clone()
        for one, sampled in zip(batch, sample(logits, [one.sampler for one in batch]), strict=True):
            one.sampled.append(sampled)
        assert torch.equal(logits, before)
        going = [one for one in going if len(one.sampled) < len(one.logits)]
    for member, one in zip(members, company, strict=True):
        alone = Sequence(*member, dtype)
        assert [sample(row[None], [alone.sampler])[0] for row in alone.logits] == one.sampled


def stock_distribution(scores: torch.Tensor, config: SamplingConfig, prompt: list[int], answer: list[int]) -> Any:
    """The processors of stock transformers in vLLM's order; float64 [v]."""
    stock = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor([prompt + answer])
    steps = []
    if config.logit_bias:
        steps.append(stock.SequenceBiasLogitsProcessor([[[one], bias] for one, bias in config.logit_bias]))
    if config.repetition_penalty != 1:
        steps.append(stock.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    for step in steps:
        scores = step(ids, scores)
    for one in set(answer):  # transformers has none of these two; the formula is OpenAI's
        scores[0, one] -= answer.count(one) * config.frequency_penalty + config.presence_penalty
    ends = [*config.stop_token_ids, *([] if config.ignore_eos else [5])]
    steps = [stock.MinNewTokensLengthLogitsProcessor(len(prompt), config.min_tokens, ends)] if ends else []
    if config.temperature:
        steps.append(stock.TemperatureLogitsWarper(config.temperature))
        steps.append(stock.MinPLogitsWarper(config.min_p))
        steps += [stock.TopKLogitsWarper(config.top_k)] if config.top_k else []
        steps.append(stock.TopPLogitsWarper(config.top_p))
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores[0], -1)


@settings(deadline=None)
@given(CONFIGS, st.integers(0, 1000), st.lists(TOKENS, min_size=1, max_size=5))
def test_tokens_are_stock_transformers(config: SamplingConfig, seed: int, prompt: list[int]) -> None:
    logits = 3 * torch.randn(8, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampler = SequenceSampler(config, prompt, V, frozenset({5}))
    generator = torch.Generator().manual_seed(config.seed)
    answer: list[int] = []
    for row in logits:
        wanted = stock_distribution(row[None].clone(), config, prompt, answer)
        token = sample(row[None], [sampler])[0].token
        if config.temperature:
            total = wanted.cumsum(0)
            uniform = torch.rand(1, generator=generator, dtype=torch.float64)
            assert token == torch.searchsorted(total, uniform * total[-1], right=True)
        else:
            assert token == wanted.argmax()
        answer.append(token)


def test_a_token_is_penalised_for_each_time_that_it_came() -> None:
    for penalties, wanted in (
        ({"frequency_penalty": 0.5}, [0, 0, 1, 0, 1]),
        ({"presence_penalty": 0.5}, [0, 0, 0, 0, 0]),
        ({"presence_penalty": 1.0}, [0, 1, 0, 0, 0]),
        ({"repetition_penalty": 2.0}, [0, 0, 0, 0, 0]),  # token 1 is in the prompt
        ({"repetition_penalty": 8.0}, [0, 2, 0, 0, 0]),
    ):
        sampler = SequenceSampler(SamplingConfig(**penalties), [1], 3, frozenset())
        tokens = [sample(torch.tensor([[2.0, 1.1, 0.6]]), [sampler])[0].token for _ in wanted]
        assert tokens == wanted, penalties


@settings(deadline=None)
@given(LOGITS, st.integers(0, 20), st.data())
def test_logprobs_are_those_of_the_raw_logits(logits: torch.Tensor, top: int, data: st.DataObject) -> None:
    size = logits.shape[-1]
    wanted = torch.log_softmax(logits, -1)
    config = SamplingConfig(temperature=9.0, logit_bias=((0, 100.0),), presence_penalty=2.0, logprobs=top)
    for row, one in enumerate(sample(logits, [SequenceSampler(config, (), size, frozenset()) for _ in logits])):
        assert one.logprob == wanted[row, one.token]
        assert [value for _, value in one.top] == wanted[row].sort(descending=True).values[:top].tolist()
        assert all(wanted[row, token] == value for token, value in one.top)
        assert len({token for token, _ in one.top}) == min(top, size)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=len(logits), max_size=len(logits))))
    values, ids, best = prompt_logprobs(logits, targets, top)
    assert torch.equal(values, wanted[range(len(logits)), targets])
    assert ids.shape == best.shape == (len(logits), min(top, size))
    assert torch.equal(wanted.gather(-1, ids), best)
    assert torch.equal(best, best.sort(descending=True).values)


def test_log_probabilities_of_a_long_prompt_are_made_in_parts() -> None:
    logits, targets = torch.randn(600, V), torch.randint(V, (600,))
    values, ids, best = prompt_logprobs(logits.bfloat16(), targets, 2)
    wanted = torch.log_softmax(logits.bfloat16().float(), -1)
    assert torch.equal(values, wanted[range(600), targets])
    assert torch.equal(best, wanted.topk(2).values)
    assert torch.equal(wanted.gather(-1, ids), best)
    assert [len(part) for part in prompt_logprobs(logits[:0], targets[:0], 2)] == [0, 0, 0]


def test_an_answer_ends_no_sooner_than_asked_for() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    for ignore_eos, wanted in ((False, [3, 3, 1]), (True, [1, 1, 1])):
        config = SamplingConfig(min_tokens=2, stop_token_ids=(2,), ignore_eos=ignore_eos)
        sampler = SequenceSampler(config, (), 4, frozenset({1}))
        assert sampler.ends == ({2} if ignore_eos else {1, 2})
        assert [sample(logits, [sampler])[0].token for _ in range(3)] == wanted
        assert sampler.plain, "nothing is left to do but argmax"


def test_logits_that_are_no_numbers_are_no_crash() -> None:
    logits = torch.full((3, 7), math.nan)
    configs = [SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.0, top_p=0.5, top_k=2), GREEDY]
    for one in sample(logits, [SequenceSampler(config, (), 7, frozenset()) for config in configs]):
        assert 0 <= one.token < 7


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1, math.nan, math.inf, 10**400, "1", None, True)),
        *({"top_k": value} for value in (-1, 1.5, True)),
        *({"top_p": value} for value in (0, 1.5, math.nan)),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": value} for value in (0, -1, math.inf)),
        *({"presence_penalty": value} for value in (-2.1, 2.1, math.nan)),
        *({"frequency_penalty": value} for value in (-2.1, 2.1, math.nan)),
        *({"logit_bias": value} for value in (((1, 101),), ((-1, 1),), ((1, 1), (1, 2)), {1: 2}, (1,), (("1", 2),))),
        *({"seed": value} for value in (1 << 63, 0.5, None)),
        *({"stop": value} for value in ("end", ("",), (1,), ["end"])),
        *({"stop_token_ids": value} for value in ((-1,), (1.0,), 1)),
        *({"ignore_eos": value} for value in (1, "no")),
        *({"min_tokens": value} for value in (-1, 1.0)),
        *({name: value} for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, 1.0, True)),
    ],
    ids=repr,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name}=.* must be"):
        SamplingConfig(**wrong)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    for config in (SamplingConfig(logit_bias=((9, 1.0),)), SamplingConfig(stop_token_ids=(1, 9))):
        with pytest.raises(ConfigError, match="names token 9, but the vocabulary ends at 8"):
            SequenceSampler(config, (), 9, frozenset())
