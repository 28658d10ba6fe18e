"""The vocabulary-parallel loss against torch's cross entropy: values, gradients, padding, chunks, no labels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vita.config import ParallelConfig
from megatron_vita.parallel import loss as loss_module
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.loss import vocab_parallel_loss
from tests.ranks import run_ranks


def _check(tp: int, vocab: int, padded: int, rows: int, chunk_bytes: int) -> None:
    loss_module._CHUNK_BYTES = chunk_bytes
    groups = build_groups(ParallelConfig(tensor_model_parallel_size=tp))
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    grad = torch.rand(rows, generator=generator, dtype=torch.float64)

    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = F.cross_entropy((whole[0] @ whole[1].t())[:, :vocab], labels, reduction="none")
    want.backward(grad)

    mine = weight.chunk(tp)[groups.tp_rank].clone().requires_grad_()
    part = hidden.clone().requires_grad_()
    got = vocab_parallel_loss(part, mine, labels, vocab_size=vocab, group=groups.collection.tp)
    torch.testing.assert_close(got, want)
    got.backward(grad)
    torch.testing.assert_close(mine.grad, whole[1].grad.chunk(tp)[groups.tp_rank])
    dist.all_reduce(part.grad, group=groups.collection.tp)
    torch.testing.assert_close(part.grad, whole[0].grad)
    destroy_groups()


CASES = [
    (33, 34, 9, 1 << 20),
    (33, 36, 9, 8 * 34 * 2),  # two rows a chunk: the softmax is computed again in the backward
    (16, 34, 9, 1 << 20),  # the last rank holds nothing but padding
    (33, 34, 0, 1 << 20),
]


@pytest.mark.parametrize(("vocab", "padded", "rows", "chunk"), CASES)
def test_one_rank(vocab: int, padded: int, rows: int, chunk: int) -> None:
    run_ranks(1, _check, 1, vocab, padded, rows, chunk)


def _check_all() -> None:
    for case in CASES:
        _check(2, *case)


def test_two_ranks() -> None:
    run_ranks(2, _check_all)


def _check_frozen_and_low() -> None:
    groups = build_groups(ParallelConfig())
    rows = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.bfloat16)
    labels = torch.tensor([0, 3, 10, 4, 4])
    got = vocab_parallel_loss(rows, weight, labels, vocab_size=11, group=groups.collection.tp)
    assert got.dtype == torch.float32
    want = F.cross_entropy((rows.detach() @ weight.t()).float(), labels, reduction="none")
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    destroy_groups()


def test_frozen_head_and_bfloat16() -> None:
    run_ranks(1, _check_frozen_and_low)
