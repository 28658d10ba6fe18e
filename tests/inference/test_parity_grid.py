"""Every layout against stock transformers: logits of every step, while the reference's tokens are fed (float32).

One world of ranks runs many cases, because starting ranks costs seconds. `tests/inference/parity.py` has the models
and prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.inference.sampling import SamplingConfig
from megatron_vita.parallel.kv_cache import KVCache
from tests.inference.parity import MODELS, Case, compare, forced_logits, load, read_cases, write_cases
from tests.ranks import run_ranks

pytest.importorskip("transformers")

Layout = tuple[int, int, int]
"""Tensor, context and pipeline ranks."""
TWO: tuple[Layout, ...] = ((2, 1, 1), (1, 2, 1), (1, 1, 2))
FOUR: tuple[Layout, ...] = ((1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2))
CHUNKS = (4096, 33, 17, 16, 15, 8)
"""Tokens of a context rank; blocks have 16, and chunks that are not a prompt's last are whole blocks where they can."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("grid")
    run_ranks(1, write_cases, str(path))
    return str(path)


def engine_of(folder: str, layout: Layout, model: str = "qwen2", **settings: Any) -> Any:
    names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    return load(Path(folder) / model, **dict(zip(names, layout, strict=True)), **settings)


def at_random_times(cases: Sequence[Case], seed: int) -> list[int]:
    """Steps at which the cases are asked: several at once, none for a while, again and again."""
    draw = random.Random(seed)
    return [draw.choice((0, draw.randrange(4), draw.randrange(20))) for _ in cases]


def check(engine: Any, cases: Sequence[Case], arrivals: Sequence[int], where: object, tolerance: float = 1e-4) -> None:
    found = forced_logits(engine, cases, arrivals)
    if dist.get_rank() == engine._world.sampler:
        compare(found, cases, str(where), tolerance)


def _layouts(folder: str, layouts: Sequence[Layout], chunks: Sequence[int], thin: int | None = None) -> None:
    """All cases in each layout at each size of chunks, of blocks of 16 and of 4 tokens; every other case with chunks of
    `thin`, which take the most steps."""
    cases = read_cases(folder, "qwen2")
    for number, layout in enumerate(layouts):
        for block_size in (16, 4):
            engine = engine_of(folder, layout, block_size=block_size)
            for seed, chunk in enumerate(chunks if block_size == 16 else chunks[1::2]):
                engine.worker.scheduler.budget = chunk * layout[1]
                asked = cases[number % 2 :: 2] if chunk == thin else cases
                arrivals = at_random_times(asked, 100 * number + seed) if seed else [0] * len(asked)
                check(engine, asked, arrivals, (layout, block_size, chunk))
            engine.close()


def test_one_rank(folder: str) -> None:
    run_ranks(1, _layouts, folder, [(1, 1, 1)], [*CHUNKS, 1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_ranks(folder: str, layout: Layout) -> None:
    run_ranks(2, _layouts, folder, [layout], CHUNKS)


@pytest.mark.slow
def test_four_ranks(folder: str) -> None:
    run_ranks(4, _layouts, folder, FOUR, (4096, 15, 8), 8)


def _models(folder: str, layouts: Sequence[Layout], names: Sequence[str]) -> None:
    for name in names:
        cases = read_cases(folder, name)
        for seed, layout in enumerate(layouts):
            engine = engine_of(folder, layout, name, chunked_prefill_size=24)
            check(engine, cases, at_random_times(cases, seed), (name, layout))
            engine.close()


@pytest.mark.slow
def test_other_decoders_and_yarn_beyond_its_original_length(folder: str) -> None:
    run_ranks(2, _models, folder, TWO, [name for name in MODELS if name != "qwen2"])


def _short_prompts(folder: str, layout: Layout, chunk: int) -> None:
    """A token a rank and step: prompts shorter than the ranks, ranks without any token of a chunk."""
    short = [case for case in read_cases(folder, "qwen2") if case.length < 18 or case.name in ("picture", "tiles")]
    engine = engine_of(folder, layout, chunked_prefill_size=chunk)
    check(engine, short, at_random_times(short, 5), ("short", layout))
    for case in short[:2] + short[-4:]:
        check(engine, [case], [0], ("alone", layout, case.name))


@pytest.mark.slow
def test_a_token_of_a_rank_at_a_time(folder: str) -> None:
    run_ranks(4, _short_prompts, folder, (1, 4, 1), 1)


def _shared(folder: str, layout: Layout) -> None:
    """Asked again, a prompt finds its blocks in the cache, wherever they lie."""
    cases = read_cases(folder, "qwen2")
    engine = engine_of(folder, layout, block_size=4, chunked_prefill_size=24, enable_prefix_caching=True)
    shared = []
    plan = engine.worker.scheduler.plan

    def watch() -> Any:
        found = plan()
        shared.extend(chunk.sequence.shared for chunk in found.chunks)
        return found

    engine.worker.scheduler.plan = watch
    for seed in range(2):
        check(engine, cases, at_random_times(cases, seed), ("shared", layout, seed))
        assert (max(shared) > 100) == bool(seed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 2, 1)], ids=str)
def test_shared_prefixes(folder: str, layout: Layout) -> None:
    run_ranks(layout[0] * layout[1], _shared, folder, layout)


def _heads(folder: str, layouts: Sequence[Layout]) -> None:
    cases = read_cases(folder, "qwen2")[::2]
    for layout in layouts:
        for head in ("chunked", "full"):
            engine = engine_of(folder, layout, lm_head=head, chunked_prefill_size=24)
            check(engine, cases, at_random_times(cases, 2), (head, layout))
            engine.close()


@pytest.mark.slow
def test_heads_that_compute_all_rows(folder: str) -> None:
    run_ranks(2, _heads, folder, TWO)


def _full_cache(folder: str, layout: Layout) -> None:
    """A cache that holds the longest prompt and little beside it: sequences give their blocks back and start again."""
    cases = [case for case in read_cases(folder, "qwen2") if case.length <= 65]
    heads, layers = 4 // layout[0], 2 // layout[2]
    block = KVCache.block_bytes(layers=layers, block_size=2, groups=heads, head_dim=8, dtype=torch.float32)
    blocks = -(-72 // layout[1] // 2) + 2
    engine = engine_of(folder, layout, block_size=2, kv_cache_memory=str(blocks * block), chunked_prefill_size=12)
    assert engine.worker.cache.num_blocks == blocks
    check(engine, cases, [0] * len(cases), ("full cache", layout))
    assert engine.worker.scheduler.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_a_full_cache(folder: str, layout: Layout) -> None:
    run_ranks(layout[1], _full_cache, folder, layout)


def _hot(folder: str, layouts: Sequence[Layout]) -> None:
    """With a hot temperature a difference of one bit in a probability soon gives another token."""
    cases = read_cases(folder, "qwen2")
    samples = [case.sample for case in cases if case.example is None]
    hot = SamplingConfig(temperature=1.5, seed=7)
    for layout in layouts:
        engine = engine_of(folder, layout, chunked_prefill_size=24)
        steps: list[list[tuple[int, tuple[int, ...]]]] = []
        step = engine.worker.step

        def watch(news: Any, *, stream: bool = True, step: Any = step, steps: Any = steps, engine: Any = engine) -> Any:
            alive = list(engine.worker.sequences.values())
            outputs = step(news, stream=stream)
            alive += [one for one in engine.worker.sequences.values() if one not in alive]
            steps.append([(one.number, tuple(one.generated)) for one in alive])
            return outputs

        engine.worker.step = watch
        answers = engine.generate(samples, max_new_tokens=12, sampling=hot)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, steps)
        assert len(steps) > 12
        assert max(len(tokens) for one in steps for _, tokens in one) == 12
        assert all(one == steps for one in everybody), f"{layout}: ranks hold other tokens"
        assert not engine.leader or len({answer.ids for answer in answers}) > 3
        engine.close()


@pytest.mark.slow
def test_every_rank_takes_the_same_hot_token(folder: str) -> None:
    run_ranks(2, _hot, folder, TWO)
    run_ranks(4, _hot, folder, FOUR)


def _greedy(folder: str, layouts: Sequence[Layout]) -> None:
    """Tokens of TP2 x CP2 are TP4's: the head count allows both."""
    samples = [case.sample for case in read_cases(folder, "qwen2") if case.example is None]
    found = []
    for layout in layouts:
        engine = engine_of(folder, layout, chunked_prefill_size=24)
        found.append(engine.generate(samples, max_new_tokens=24))
        engine.close()
    assert found[0] == found[1]


@pytest.mark.slow
def test_tp2_cp2_gives_the_tokens_of_tp4(folder: str) -> None:
    run_ranks(4, _greedy, folder, [(4, 1, 1), (2, 2, 1)])


def _half(folder: str, layout: Layout, path: str) -> None:
    """bfloat16's distance to the float32 reference; one rank's is read from `path`, or written there."""
    cases = read_cases(folder, "qwen2")[::2]
    engine = engine_of(folder, layout, dtype="bfloat16", chunked_prefill_size=24)
    found = forced_logits(engine, cases, at_random_times(cases, 3))
    if dist.get_rank() == engine._world.sampler:
        gaps = torch.stack([(found[case.name] - case.logits).square().mean().sqrt() for case in cases])
        if layout == (1, 1, 1):
            torch.save(gaps, path)
        else:
            alone = torch.load(path)
            assert gaps.mean() < 1.15 * alone.mean(), (layout, gaps.mean(), alone.mean())
            assert (gaps < 2 * alone.clamp_min(0.05)).all(), (layout, gaps, alone)
    engine.close()


def _halves(folder: str, layouts: Sequence[Layout], path: str) -> None:
    for layout in layouts:
        _half(folder, layout, path)


@pytest.mark.slow
def test_bfloat16_is_as_close_as_on_one_rank(folder: str, tmp_path: Path) -> None:
    path = str(tmp_path / "gaps.pt")
    run_ranks(1, _halves, folder, [(1, 1, 1)], path)
    assert 0.005 < torch.load(path).mean() < 0.5
    run_ranks(2, _halves, folder, TWO[:2], path)
    run_ranks(4, _halves, folder, FOUR[:2], path)
