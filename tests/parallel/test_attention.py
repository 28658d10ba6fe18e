"""Attention over packed documents: against the definition, forward and backward, however the keys travel."""

from __future__ import annotations

import functools
import gc
import math

import pytest
import torch
import torch.distributed as dist

from megatron_vita.checks import attention as reference
from megatron_vita.config import ParallelConfig
from megatron_vita.layout import SequenceLayout
from megatron_vita.parallel.attention import document_attention
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.schedule import build_schedule
from tests.models.watch import Watch
from tests.ranks import run_ranks

CPU = torch.device("cpu")
KINDS = ("p2p", "all_gather", "a2a")
DOCUMENTS = {
    "one document": (72,),
    "documents of one token": (1, 1, 70),
    "many": (13, 27, 5, 19, 8),
    "equal": (24, 24, 24),
    "tiny: shorter than 2 * cp, so that some ranks have no token of them": (3, 2, 40, 1, 2, 1, 3, 7, 1, 12),
    "nothing but single tokens": (1,) * 24,
    "enough tiny ones to be padded together": (5, 8, 3, 7, 4, 6) * 16,
    "long and short": (700, 4, 128, 128, 120, 44, 20, 8),
}
HEADS = {"h = g": (4, 4), "h = 2 g": (4, 2), "h = 4 g": (8, 2), "g = 1": (4, 1)}


def _inputs(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the output's gradient of the whole packed sequence, [length, heads, 16] each."""
    generator = torch.Generator().manual_seed(length + heads)
    return [torch.randn(length, n, 16, generator=generator, dtype=dtype) for n in (heads, groups, groups, heads)]


@functools.cache
def _definition(
    documents: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """float64 (q, k, v, the output's gradient), (output, dq, dk, dv); computed once, and for all ranks when it is asked
    for before they are forked."""
    inputs = [x.to(dtype).double() for x in _inputs(sum(documents), *heads, torch.float64)]
    whole = [x.clone().requires_grad_() for x in inputs[:3]]
    want = reference.document_attention(*whole, documents, 1 / math.sqrt(16))
    want.backward(inputs[3])
    return inputs, [want.detach(), *(x.grad for x in whole)]


def _define_all() -> None:
    for heads in HEADS.values():
        for documents in DOCUMENTS.values():
            _definition(documents, heads, torch.float64)


def _permuted(x: torch.Tensor) -> torch.Tensor:
    """The same values in another memory order, heads outermost."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _compare(
    documents: tuple[int, ...],
    *,
    heads: tuple[int, int] = (4, 2),
    kind: str = "all_gather",
    cp: int = 1,
    cp_rank: int = 0,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float64,
    strided: bool = False,
    tolerance: float = 1e-12,
) -> None:
    """This rank's output and gradients are the definition's, relative to each tensor's largest value."""
    layout = SequenceLayout(documents, cp=cp)
    (*whole, grad), want = _definition(documents, heads, dtype)
    mine = torch.from_numpy(layout.local_positions(cp_rank))
    part = [x[mine].to(dtype).requires_grad_() for x in whole]
    inputs, given = [x * 1 for x in part], grad[mine].to(dtype)
    if strided:
        inputs, given = [_permuted(x) for x in inputs], _permuted(given)
    got = document_attention(*inputs, build_schedule(layout, cp_rank, CPU, kind), group, 1 / math.sqrt(16))
    assert got.dtype == dtype
    got.backward(given)
    found = [got.detach(), *(one.grad for one in part)]
    for name, one, full in zip(("output", "dq", "dk", "dv"), found, want, strict=True):
        worst = float((one.double() - full[mine]).abs().max() / full.abs().max().clamp_min(0.1))  # dq of one token: 0
        assert worst <= tolerance, f"{kind}, cp {cp}, documents {documents}, heads {heads}, {name}: {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_one_rank_equals_the_definition(documents: tuple[int, ...], strided: bool) -> None:
    for heads in HEADS.values():
        _compare(documents, heads=heads, strided=strided)


def test_the_projection_of_queries_keys_and_values_is_not_kept() -> None:
    """v is a view of it; q and k are copies, by the rotary embedding."""
    schedule = build_schedule(SequenceLayout((72,)), 0, CPU)
    with Watch() as watch:
        mixed = torch.randn(72, 8 * 16, requires_grad=True) * 1.0
        q, k, v = (x.unflatten(1, (-1, 16)) for x in mixed.split([96, 16, 16], dim=1))
        out = document_attention(q * 1.0, k * 1.0, v, schedule, None, 0.25)
        before = watch.live
        del mixed, q, k, v
        gc.collect()
        assert before - watch.live == 72 * 8 * 16 * 4
    assert out.requires_grad


def _check_all(cp: int) -> None:
    groups = build_groups(ParallelConfig(context_parallel_size=cp))
    here = {"cp": cp, "cp_rank": groups.cp_rank, "group": groups.collection.cp}
    for kind in KINDS:
        for heads in HEADS.values():
            if kind == "a2a" and heads[1] % cp:
                continue
            for number, documents in enumerate(DOCUMENTS.values()):
                if sum(documents) % cp == 0:
                    _compare(documents, heads=heads, kind=kind, strided=number % 2 == 0, **here)
        groups_of_four = (8, 4) if kind == "a2a" else (4, 2)
        if cp != 3:
            _compare(DOCUMENTS["many"], heads=groups_of_four, kind=kind, dtype=torch.float32, tolerance=1e-5, **here)
            _compare(DOCUMENTS["many"], heads=groups_of_four, kind=kind, dtype=torch.bfloat16, tolerance=0.02, **here)
    destroy_groups()


@pytest.mark.slow
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_context_parallel_equals_the_definition(cp: int) -> None:
    _define_all()
    run_ranks(cp, _check_all, cp)


def _check_eight() -> None:
    groups = build_groups(ParallelConfig(context_parallel_size=8))
    here = {"cp": 8, "cp_rank": groups.cp_rank, "group": groups.collection.cp}
    for kind in KINDS:
        for name in ("one document", "many", "nothing but single tokens"):
            _compare(DOCUMENTS[name], heads=(8, 8) if kind == "a2a" else (4, 2), kind=kind, **here)
    destroy_groups()


@pytest.mark.slow
def test_eight_ranks_equal_the_definition() -> None:
    run_ranks(8, _check_eight)
