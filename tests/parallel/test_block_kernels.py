"""Block kernels against the reference implementation, and `merge`."""

from __future__ import annotations

import pytest
import torch

from megatron_vita.checks import kernels
from megatron_vita.kernels import Attention
from megatron_vita.parallel import block_kernels, flash
from megatron_vita.parallel.block_kernels import Blocks

CAUSAL = Blocks(((3, 17, 17), (1, 40, 40), (2, 1, 1)), causal=True)
FULL = Blocks(((3, 17, 5), (1, 1, 40), (2, 30, 1)), causal=False)


def _random_inputs(blocks: Blocks, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    queries, keys = (sum(run[0] * run[side] for run in blocks.runs) for side in (1, 2))
    shapes = [(queries, 4, 16), (keys, groups, 16), (keys, groups, 16), (queries, 4, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("blocks", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_equal_the_reference(blocks: Blocks, dtype: torch.dtype, groups: int) -> None:
    q, k, v, grad = _random_inputs(blocks, groups, dtype)
    close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    out, lse = block_kernels.forward(q, k, v, blocks, 0.3)
    want = block_kernels.by_runs(block_kernels.reference_forward, blocks, 0.3, (q,), (k, v))
    for one, other in zip((out, lse), want, strict=True):
        torch.testing.assert_close(one, other, **close)
    # A log-sum-exp over more keys than the block's, in another memory order than the kernel's own.
    wider = (lse + 0.5).contiguous()
    got = block_kernels.backward(grad, q, k, v, out, wider, blocks, 0.3)
    want = block_kernels.by_runs(block_kernels.reference_backward, blocks, 0.3, (grad, q), (k, v), (out, wider))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_reference_is_autograd_of_the_definition() -> None:
    q, k, v, grad = (x[:17].transpose(0, 1)[None].requires_grad_() for x in _random_inputs(CAUSAL, 2, torch.float64))
    out, lse = block_kernels.reference_forward(q, k, v, causal=True, scale=0.3)
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, want)
    got = block_kernels.reference_backward(grad, q, k, v, out, lse, causal=True, scale=0.3)
    torch.testing.assert_close(got, torch.autograd.grad(want, (q, k, v), grad))


def test_merging_two_halves_of_the_keys_gives_the_whole() -> None:
    q, k, v, _ = _random_inputs(Blocks(((1, 40, 40),), causal=False), 4, torch.float64)
    whole = block_kernels.forward(q, k, v, Blocks(((1, 40, 40),), causal=False), 1.0)
    parts = []
    for keys in (slice(0, 13), slice(13, 40)):
        count = keys.stop - keys.start
        parts.append(block_kernels.forward(q, k[keys], v[keys], Blocks(((1, 40, count),), causal=False), 1.0))
    for one, other in zip(block_kernels.merge(*parts[0], *parts[1]), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_merging_keeps_float32_when_what_comes_is_bfloat16() -> None:
    out, lse = torch.randn(5, 2, 8), torch.randn(5, 2)
    merged, _ = block_kernels.merge(out, lse, torch.randn(5, 2, 8).bfloat16(), torch.full((5, 2), -80.0))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, out)


def test_pairs_count_what_a_kernel_computes() -> None:
    assert CAUSAL.pairs == 3 * 17 * 18 // 2 + 40 * 41 // 2 + 2
    assert FULL.pairs == 3 * 17 * 5 + 40 + 2 * 30


def test_parity_says_what_is_not_installed() -> None:
    found = {kernel: kernels.parity(kernel) for kernel in kernels.KERNELS}
    assert found.pop(Attention.CPU_FLASH) < 1e-5
    assert set(found) == set(flash.KERNELS)
    if not torch.cuda.is_available():
        assert all(verdict.startswith("not installed: ") for verdict in found.values())


def test_parity_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_kernels.cpu_backward
    monkeypatch.setattr(block_kernels, "cpu_backward", lambda *a, **k: tuple(x * 1.01 for x in right(*a, **k)))
    assert kernels.parity(Attention.CPU_FLASH) > 1e-3
