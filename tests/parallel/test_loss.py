"""The vocabulary-parallel loss against torch's cross entropy: values, gradients, padding, chunks, no labels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.config import ParallelConfig
from megatron_vita.parallel import loss as loss_module
from megatron_vita.parallel.groups import build_groups, destroy_groups
from megatron_vita.parallel.loss import vocab_parallel_loss
from tests.models.watch import Watch
from tests.ranks import run_ranks


def _check(tp: int, vocab: int, padded: int, tokens: int, least: int) -> None:
    """Losses and gradients, with equal and with different upstream gradients of the tokens."""
    loss_module._MIN_TOKENS = least
    groups = build_groups(ParallelConfig(tensor_model_parallel_size=tp))
    group = groups.collection.tp
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    for factors in (torch.tensor(0.7).double(), torch.rand(tokens, generator=generator, dtype=torch.float64)):
        whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        want = F.cross_entropy((whole[0] @ whole[1].t())[:, :vocab], labels, reduction="none")
        mine = weight.chunk(tp)[groups.tp_rank].clone().requires_grad_()
        part = hidden.clone().requires_grad_()
        got = vocab_parallel_loss(part, mine, labels, vocab_size=vocab, group=group)
        torch.testing.assert_close(got, want)
        for losses in (want, got):
            (losses.sum() * factors if factors.dim() == 0 else (losses * factors).sum()).backward()
        torch.testing.assert_close(mine.grad, whole[1].grad.chunk(tp)[groups.tp_rank])
        dist.all_reduce(part.grad, group=group)
        torch.testing.assert_close(part.grad, whole[0].grad)
    destroy_groups()


CASES = [
    (33, 34, 9, 256),
    (33, 36, 9, 2),  # chunks of two tokens, the last of one
    (16, 34, 9, 256),  # the last rank holds nothing but padding
    (33, 34, 0, 256),
    (33, 34, 1, 256),
]


@pytest.mark.parametrize(("vocab", "padded", "tokens", "least"), CASES)
def test_one_rank(vocab: int, padded: int, tokens: int, least: int) -> None:
    run_ranks(1, _check, 1, vocab, padded, tokens, least)


def _check_all() -> None:
    for case in CASES:
        _check(2, *case)


def test_two_ranks() -> None:
    run_ranks(2, _check_all)


def _check_frozen_and_low() -> None:
    groups = build_groups(ParallelConfig())
    hidden = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.bfloat16)
    labels = torch.tensor([0, 3, 10, 4, 4])
    got = vocab_parallel_loss(hidden, weight, labels, vocab_size=11, group=groups.collection.tp)
    assert got.dtype == torch.float32
    want = F.cross_entropy((hidden.detach() @ weight.t()).float(), labels, reduction="none")
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    destroy_groups()


def test_frozen_head_and_bfloat16() -> None:
    run_ranks(1, _check_frozen_and_low)


def _check_bfloat16_gradients() -> None:
    groups = build_groups(ParallelConfig())
    group = groups.collection.tp
    exact = [torch.randn(40, 16).double().requires_grad_(), torch.randn(30, 16).double().requires_grad_()]
    low = [one.detach().bfloat16().requires_grad_() for one in exact]
    labels = torch.randint(0, 30, (40,))
    F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum").backward()
    vocab_parallel_loss(*low, labels, vocab_size=30, group=group).sum().backward()
    for one, want in zip(low, exact, strict=True):
        assert one.grad.dtype == torch.bfloat16
        assert F.cosine_similarity(one.grad.double().flatten(), want.grad.flatten(), dim=0) > 0.999
    destroy_groups()


def test_bfloat16_gradients() -> None:
    run_ranks(1, _check_bfloat16_gradients)


def _check_peak() -> None:
    """The output layer's gradient is float32 once, and no other tensor of its size exists in forward and backward."""
    loss_module._BLOCK = 1000
    groups = build_groups(ParallelConfig())
    hidden = torch.randn(300, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4001, 16, dtype=torch.bfloat16, requires_grad=True)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    labels = torch.randint(0, 4001, (300,))
    made: list[tuple[torch.Size, torch.dtype]] = []
    with Watch(lambda new, _: made.append((new.shape, new.dtype)) if new.numel() >= weight.numel() else None):
        loss = vocab_parallel_loss(hidden, weight, labels, vocab_size=4001, group=groups.collection.tp).sum()
        (grad,) = torch.autograd.grad(loss * 0.5, weight)
    logits = (256, 4001), (44, 4001)
    assert [one for one in made if tuple(one[0]) not in logits] == [(weight.shape, torch.float32)]
    assert grad.dtype == torch.bfloat16
    (F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum") * 0.5).backward()
    assert F.cosine_similarity(grad.double().flatten(), exact[1].grad.flatten(), dim=0) > 0.9999
    destroy_groups()


def test_the_output_layers_gradient_exists_once() -> None:
    run_ranks(1, _check_peak)


@given(rows=st.integers(1, 9), columns=st.integers(1, 7), block=st.integers(1, 64))
def test_narrowing_in_place_rounds_every_number(rows: int, columns: int, block: int) -> None:
    wide = torch.randn(rows, columns)
    expected = wide.bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_BLOCK", block)
        narrow = loss_module._narrow_(wide, torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()


def _check_no_labels() -> None:
    groups = build_groups(ParallelConfig())
    hidden = torch.randn(0, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    with Watch() as watch:
        labels = torch.zeros(0, dtype=torch.int64)
        losses = vocab_parallel_loss(hidden, weight, labels, vocab_size=64, group=groups.collection.tp)
        assert watch.live < weight.nbytes, "nothing is kept for the backward"
        losses.sum().backward()
    assert watch.peak < 1.5 * weight.nbytes, "the gradient of the weight, once, in its dtype"
    assert weight.grad is not None
    assert not weight.grad.any()
    assert hidden.grad is not None
    destroy_groups()


def test_without_labels_the_gradient_is_zeros_made_in_the_backward() -> None:
    run_ranks(1, _check_no_labels)


def _check_twice_and_never() -> None:
    groups = build_groups(ParallelConfig())
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.arange(6)
    total = vocab_parallel_loss(hidden, weight, labels, vocab_size=11, group=groups.collection.tp).sum()
    total.backward(retain_graph=True)
    once = [one.grad.clone() for one in (hidden, weight)]
    total.backward()
    for one, first in zip((hidden, weight), once, strict=True):
        torch.testing.assert_close(one.grad, 2 * first)
    with torch.no_grad():
        again = vocab_parallel_loss(hidden, weight, labels, vocab_size=11, group=groups.collection.tp).sum()
    torch.testing.assert_close(again, total.detach())
    destroy_groups()


def test_a_second_backward_and_none_at_all() -> None:
    run_ranks(1, _check_twice_and_never)


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "each"),
    [(100, 64, 1000, 256), (32768, 5120, 19008, 1024), (32768, 896, 151936, 256), (0, 8, 8, None)],
)
def test_a_chunk_holds_a_small_part_of_the_logits(tokens: int, width: int, vocab: int, each: int | None) -> None:
    found = loss_module._chunks(torch.empty(tokens, width, device="meta"), torch.empty(vocab, width, device="meta"))
    assert sum(chunk.stop - chunk.start for chunk in found) == tokens
    assert all(chunk.stop - chunk.start <= (each or 0) for chunk in found)
    if tokens > 256:
        assert found[0].stop == each
