"""Attention to a cache that is spread over ranks: against the definition, whichever way keys and queries travel."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vita.config import ParallelConfig
from megatron_vita.data.example import Example
from megatron_vita.inference.batch import StepBatch, build_batch
from megatron_vita.inference.blocks import BlockManager
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling import GREEDY
from megatron_vita.inference.scheduler import Chunk, StepPlan
from megatron_vita.inference.sequence import Sequence
from megatron_vita.parallel import cached_attention as module
from megatron_vita.parallel.cached_attention import cached_attention, passes_queries
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.kv_cache import KVCache
from megatron_vita.parallel.schedule import build_schedule
from tests.inference.tiny import question
from tests.ranks import run_ranks

CPU = torch.device("cpu")
D = 16
SCALE = 1 / math.sqrt(D)
REQUEST = Request("0", question("the"), GREEDY)


@dataclass
class Document:
    """A sequence with queries, keys and values for all of its tokens, the same on every rank."""

    sequence: Sequence
    q: Tensor
    k: Tensor
    v: Tensor
    start: int
    """Tokens that were cached before the step."""

    def expected(self) -> Tensor:
        """The definition, [tokens - start, h, d]."""
        repeats = self.q.shape[1] // self.k.shape[1]
        k, v = (x.double().repeat_interleave(repeats, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q[self.start :].double(), k) * SCALE
        places = torch.arange(len(self.k))
        scores.masked_fill_(places > places[self.start :, None], -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@dataclass
class Traffic:
    """Counts what the collectives of cached attention send to a rank."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._own = {name: getattr(module, name) for name in ("gather_tokens", "exchange_tokens", "ring_send_recv")}
        for name in self._own:
            setattr(module, name, self._counted(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, own in self._own.items():
            setattr(module, name, own)

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group", args[-1] if name != "ring_send_recv" else args[0])
            others = group.size() - 1
            received = {
                "gather_tokens": others * tensor.nbytes,
                "exchange_tokens": tensor.nbytes * others // group.size(),  # equally much from everybody
                "ring_send_recv": tensor.nbytes,
            }
            self.calls.append((name, received[name]))
            return self._own[name](tensor, *args, **kwargs)

        return call


class Setting:
    """A step over random documents, whose earlier tokens lie anywhere: in fragments, on some ranks only."""

    def __init__(self, draw: random.Random, ranks: int, rank: int, dtype: torch.dtype) -> None:
        self.heads, self.groups = draw.choice([(4, 2), (4, 4), (6, 1)])
        size = draw.choice([1, 4, 16])
        self.blocks = BlockManager(num_blocks=-(-3000 // size), block_size=size, ranks=ranks, rank=rank)
        self.dtype, self.draw = dtype, draw
        self.generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        self.cache = KVCache(
            [1],
            num_blocks=self.blocks.num_blocks,
            block_size=size,
            groups=self.groups,
            head_dim=D,
            dtype=dtype,
            device=CPU,
        )
        for stored in self.cache[1]:
            stored.fill_(torch.nan)  # whatever reads a slot that nobody has written says so
        self._fragment(size)
        chunks = draw.randint(0, 4)
        decodes = draw.randint(0 if chunks else 1, 5)
        self.chunks = [
            self._document(draw.choice((0, 0, 1, 5, 40, 300)), draw.choice((1, 2, 3, 7, 16, 33))) for _ in range(chunks)
        ]
        self.decodes = [self._document(draw.choice((1, 2, 17, 60, 300)), 1) for _ in range(decodes)]

    def _fragment(self, size: int) -> None:
        """Holes of one to many blocks."""
        tables = [self.blocks.table() for _ in range(60)]
        for table in tables:
            self.blocks.add(table, [size * self.draw.randint(1, 4) for _ in range(self.blocks.ranks)])
        for table in tables[:: self.draw.randint(2, 3)]:
            self.blocks.free(table)

    def _document(self, cached: int, new: int) -> Document:
        tokens = np.zeros(cached + new, dtype=np.int32)
        example = Example(tokens[: max(1, cached)], tokens[: max(1, cached)])
        sequence = Sequence(0, REQUEST, example, 99, self.blocks.table())
        sequence.generated = [0] * (len(tokens) - len(example.tokens))
        shapes = [(len(tokens), heads, D) for heads in (self.heads, self.groups, self.groups)]
        q, k, v = (torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        found = Document(sequence, q, k, v, cached)
        ranks = self.blocks.ranks
        some = self.draw.sample(range(ranks), self.draw.randint(1, ranks))
        place = 0
        while place < cached:  # several chunks, each dealt in some way
            count = min(cached - place, self.draw.randint(1, 90))
            owner = [self.draw.choice(some) for _ in range(count)]
            slots = self.blocks.add(sequence.table, [owner.count(rank) for rank in range(ranks)])
            own = [place + number for number, rank in enumerate(owner) if rank == self.blocks.rank]
            for stored, whole in zip(self.cache[1], (k, v), strict=True):
                stored[torch.from_numpy(slots)] = whole[own]
            place += count
        sequence.computed = cached
        return found

    def batch(self) -> StepBatch:
        chunks = tuple(Chunk(one.sequence, one.start, len(one.k)) for one in self.chunks)
        decodes = tuple(one.sequence for one in self.decodes)
        slots = tuple(self.blocks.add_decoded(one.table) for one in decodes)
        return build_batch(StepPlan(chunks, decodes, slots), self.blocks, self.cache, CPU)

    def local(self, batch: StepBatch, parts: list[Tensor], decoded: list[Tensor]) -> Tensor:
        """This rank's rows of the documents' new tokens, and of the tokens that decode; padding is zeros."""
        rows = []
        if batch.layout is not None:
            packed = torch.cat(parts)
            padding = packed.new_zeros(batch.layout.length - len(packed), *packed.shape[1:])
            mine = torch.from_numpy(batch.layout.local_positions(self.blocks.rank))
            rows.append(torch.cat([packed, padding])[mine])
        return torch.cat(rows + decoded)


def _bits(x: Tensor) -> Tensor:
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.itemsize])


def _check(draw: random.Random, group: Any, rank: int, ranks: int, dtype: torch.dtype, queries: bool | None) -> None:
    """One step. queries: which way is forced; None: the rule decides."""
    setting = Setting(draw, ranks, rank, dtype)
    batch = setting.batch()
    inputs = []
    for name in "qkv":
        parts = [getattr(one, name)[one.start :] for one in setting.chunks]
        inputs.append(setting.local(batch, parts, [getattr(one, name)[one.start :] for one in setting.decodes]))
    want = setting.local(batch, [one.expected() for one in setting.chunks], [one.expected() for one in setting.decodes])
    before = [stored.clone() for stored in setting.cache[1]]
    kind = draw.choice(("p2p", "all_gather"))
    schedule = None if batch.layout is None else build_schedule(batch.layout, rank, CPU, kind)
    rule = module.passes_queries
    if queries is not None:
        module.passes_queries = lambda **_: queries
    try:
        with Traffic() as traffic:
            got = cached_attention(*inputs, step=batch.step, schedule=schedule, layer=1, cp_group=group, scale=SCALE)
    finally:
        module.passes_queries = rule
    used = sum(len(one.k) - one.start for one in setting.chunks)
    real = torch.ones(len(got), dtype=torch.bool)
    if batch.layout is not None:
        real[: batch.step.prefill_tokens] = torch.from_numpy(batch.layout.local_positions(rank)) < used
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(got[real].double(), want[real], atol=tolerance, rtol=tolerance)
    assert got.dtype == dtype
    for stored, old in zip(setting.cache[1], before, strict=True):
        same = torch.ones(len(stored), dtype=torch.bool)
        same[batch.step.slots] = False
        assert torch.equal(_bits(stored)[same], _bits(old)[same]), "a slot that is not new has changed"
    if ranks > 1:
        _check_traffic(setting, batch, traffic, queries)
        decoded = got[batch.step.prefill_tokens :].contiguous()
        everybody = [torch.empty_like(decoded) for _ in range(ranks)]
        dist.all_gather(everybody, decoded, group=group)
        assert all(torch.equal(_bits(one), _bits(decoded)) for one in everybody), "ranks have other bits"
    else:
        assert not traffic.calls


def _check_traffic(setting: Setting, batch: StepBatch, traffic: Traffic, queries: bool | None) -> None:
    """What the module's docstring says, in bytes; one exchange of a layer for all that decode."""
    others, e = setting.blocks.ranks - 1, setting.dtype.itemsize
    wide = max(4, e)
    h, g, t = setting.heads, setting.groups, batch.step.prefill_tokens
    want = []
    if batch.step.prefixes:
        ranks = range(setting.blocks.ranks)
        c = max(sum(prefix.tokens[rank] for prefix in batch.step.prefixes) for rank in ranks)
        if queries is None:
            queries = passes_queries(queries=t, keys=c, heads=h, groups=g, head_dim=D, itemsize=e)
        if queries:
            want += [("gather_tokens", others * t * h * D * e), ("exchange_tokens", others * t * h * wide * (D + 1))]
        else:
            want += [("ring_send_recv", c * 2 * g * D * e)] * others
    if setting.decodes:
        want.append(("gather_tokens", others * len(setting.decodes) * h * wide * (D + 1)))
    assert traffic.calls == want


def _check_many(ranks: int, count: int) -> None:
    groups = build_groups(ParallelConfig(context_parallel_size=ranks))
    rank, group = groups.cp_rank, groups.collection.cp
    for seed in range(count):
        for queries in (True, False, None):
            dtype = (torch.float64, torch.float32, torch.bfloat16)[seed % 3]
            _check(random.Random(seed), group, rank, ranks, dtype, queries)
    destroy_groups()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_any_cache_equals_the_definition(ranks: int) -> None:
    run_ranks(ranks, _check_many, ranks, 40 if ranks < 4 else 20)


@given(
    st.integers(1, 200), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([8, 64, 128]),
    st.sampled_from([2, 4]),
)  # fmt: skip
def test_the_rule_takes_the_way_with_fewer_bytes(queries: int, g: int, r: int, d: int, e: int) -> None:
    h = g * r
    way = {"queries": queries, "heads": h, "groups": g, "head_dim": d, "itemsize": e}
    by_queries, of_a_key = queries * h * (d * e + 4 * (d + 1)), 2 * g * d * e
    border = by_queries // of_a_key  # keys whose bytes are at most the queries'
    assert not passes_queries(keys=border, **way)
    assert passes_queries(keys=border + 1, **way)
    assert not passes_queries(keys=0, **way)


def test_long_prompts_pass_queries_and_their_first_chunks_pass_keys() -> None:
    """A 14B's heads in bfloat16, chunks of 8,192 tokens a rank."""
    way = {"queries": 8192, "heads": 40, "groups": 8, "head_dim": 128, "itemsize": 2}
    assert not passes_queries(keys=8192, **way)
    assert passes_queries(keys=8 * 8192, **way)
