"""Attention over packed documents: against the definition, forward and backward, at every context-parallel size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_vita.config import ParallelConfig
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel import block_kernels, reference
from megatron_vita.parallel.attention import document_attention
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.schedule import build_schedule
from tests.ranks import run_ranks

ROWS = [
    (64,),
    (1, 1, 62),
    (13, 27, 5, 19),
    (16, 16, 16, 16),
    (3, 2, 40, 1, 11, 7),
    (700, 4, 128, 128, 120, 44, 20, 8),
]


def _inputs(length: int, heads: int, groups: int, size: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length + heads)
    shapes = [(length, heads, size), (length, groups, size), (length, groups, size), (length, heads, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("documents", ROWS)
def test_one_rank_equals_the_definition(documents: tuple[int, ...]) -> None:
    _compare(documents, cp=1, cp_rank=0, group=None)


def _compare(documents: tuple[int, ...], cp: int, cp_rank: int, group: dist.ProcessGroup | None) -> None:
    layout = SequenceLayout(documents, cp=cp)
    q, k, v, grad = _inputs(layout.length, 4, 2, 16)
    scale = 1 / math.sqrt(16)
    mine = torch.from_numpy(layout.local_positions(cp_rank))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    part = [x[mine].clone().requires_grad_() for x in (q, k, v)]
    want = reference.document_attention(*whole, documents, scale)
    got = document_attention(*part, build_schedule(layout, cp_rank, torch.device("cpu")), group, scale)
    torch.testing.assert_close(got, want[mine])
    want.backward(grad)
    got.backward(grad[mine])
    for name, one, full in zip("qkv", part, whole, strict=True):
        torch.testing.assert_close(one.grad, full.grad[mine], msg=lambda text, name=name: f"d{name}: {text}")


def _check_context_parallel(cp: int) -> None:
    groups = build_groups(ParallelConfig(context_parallel_size=cp))
    for documents in ROWS:
        _compare(documents, cp, groups.cp_rank, groups.collection.cp)
    destroy_groups()


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_equals_the_definition(cp: int) -> None:
    run_ranks(cp, _check_context_parallel, cp)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_equal_their_plain_twins(causal: bool, dtype: torch.dtype, groups: int) -> None:
    rows = _inputs(51, 4, groups, 16, dtype)
    q, k, v, grad = (x.view(3, 17, -1, 16).transpose(1, 2) for x in rows)
    wide_k, wide_v = (block_kernels.expand(x, rows[0]).view(3, 17, -1, 16).transpose(1, 2) for x in rows[1:3])
    scale = 0.3
    out, lse = block_kernels.forward(q, wide_k, wide_v, causal=causal, scale=scale)
    want, want_lse = block_kernels.plain_forward(q, k, v, causal=causal, scale=scale)
    close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(lse, want_lse, **close)
    # A log-sum-exp over more keys than the block's, in another memory order than the kernel's own.
    wider = (lse + 0.5).contiguous()
    dq, *wide = block_kernels.backward(grad, q, wide_k, wide_v, out, wider, causal=causal, scale=scale)
    rows = [block_kernels.reduce(x.transpose(1, 2).flatten(0, 1), groups) for x in wide]
    got = [dq, *(x.view(3, 17, -1, 16).transpose(1, 2) for x in rows)]
    expected = block_kernels.plain_backward(grad, q, k, v, out, wider, causal=causal, scale=scale)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_merging_two_halves_of_the_keys_gives_the_whole() -> None:
    q, k, v, _ = (x[None].transpose(1, 2) for x in _inputs(40, 4, 4, 8))
    want, want_lse = block_kernels.plain_forward(q, k, v, causal=False, scale=1.0)
    parts = [
        block_kernels.forward(q, k[:, :, keys], v[:, :, keys], causal=False, scale=1.0)
        for keys in (slice(0, 13), slice(13, 40))
    ]
    rows = [(out[0].transpose(0, 1), lse[0].transpose(0, 1)) for out, lse in parts]
    out, lse = block_kernels.merge(*rows[0], *rows[1])
    torch.testing.assert_close(out, want[0].transpose(0, 1))
    torch.testing.assert_close(lse, want_lse[0].transpose(0, 1))


def test_short_documents_share_a_call_and_long_ones_are_never_padded() -> None:
    layout = SequenceLayout((50, 51, 49, 52, 700, 690, 12))
    schedule = build_schedule(layout, 0, torch.device("cpu"))
    assert schedule.causal.batches == ((1, 700), (1, 690), (4, 52), (1, 12))
    assert schedule.causal.padding is not None
    assert len(schedule.causal.padding) == 4 * 52 - (50 + 51 + 49 + 52)


@pytest.mark.parametrize("documents", [(64,), (16, 16, 16, 16)])
def test_equal_documents_are_not_copied(documents: tuple[int, ...]) -> None:
    schedule = build_schedule(SequenceLayout(documents), 0, torch.device("cpu"))
    assert schedule.causal.batches == ((len(documents), documents[0]),)
    assert schedule.causal.read is None


def test_bfloat16_stays_near_float64() -> None:
    layout = SequenceLayout((30, 34))
    q, k, v, _ = _inputs(64, 4, 2, 16)
    schedule = build_schedule(layout, 0, torch.device("cpu"))
    exact = document_attention(q, k, v, schedule, None, 0.25)
    low = document_attention(*(x.bfloat16() for x in (q, k, v)), schedule, None, 0.25)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0.05, atol=0.05)
