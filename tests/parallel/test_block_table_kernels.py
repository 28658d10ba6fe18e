"""Kernel calls for cached tokens: what is gathered, what is a view, and what a GPU would be called with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vita.parallel import block_table_kernels
from megatron_vita.parallel.decode_tables import DecodeTables, Runs, _pages, slots_of

SCALE = 0.3


def plain(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [n, h, d] to all tokens of `runs`, in float64."""
    slots = torch.from_numpy(slots_of(runs))
    repeat = q.shape[1] // keys.shape[1]
    k, v = (x[slots].double().repeat_interleave(repeat, dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,khd->nhk", q.double(), k) * SCALE
    return torch.einsum("nhk,khd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)


def random_runs(rng: np.random.Generator, tokens: int, slots: int) -> list[tuple[int, int]]:
    """Runs of 16-token blocks in any order, the last one perhaps not full."""
    blocks = rng.permutation(slots // 16)[: -(-tokens // 16)]
    runs = [(int(block) * 16, 16) for block in blocks]
    runs[-1] = (runs[-1][0], (tokens - 1) % 16 + 1)
    return runs


@pytest.mark.parametrize("lengths", [[1], [5, 0, 40], [17, 300, 64, 1], [2000, 3], [0], [90] * 5])
def test_decoding_attends_to_the_tokens_of_each_sequence(lengths: list[int]) -> None:
    rng = np.random.default_rng(len(lengths))
    keys, values = torch.randn(2, 4096, 2, 8, generator=torch.Generator().manual_seed(1))
    tables: list[list[tuple[int, int]]] = []
    for length in lengths:
        contiguous = [(int(rng.integers(0, 100)) * 16, length)] if length else []
        tables.append(contiguous if rng.random() < 0.5 else random_runs(rng, length, 4096) if length else [])
    plan = DecodeTables.build(tables, token_bytes=128, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    short = [row for row, length in enumerate(lengths) if 0 < length <= 512]
    assert (plan.gathered is not None) == (len(short) > 1), "512 tokens are 64 KiB"
    q = torch.randn(len(lengths), 6, 8)
    out, lse = block_table_kernels.decode(q, keys, values, plan, SCALE)
    for row, runs in enumerate(tables):
        if not runs:
            assert not out[row].any()
            assert (lse[row] == float("-inf")).all()
            continue
        want, want_lse = plain(q[row : row + 1], keys, values, runs)
        torch.testing.assert_close(out[row], want[0].float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[row], want_lse[0].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 63, 64, 500, 1500])
def test_queries_of_a_chunk_attend_to_any_runs(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    keys, values = torch.randn(2, 4096, 2, 8, generator=torch.Generator().manual_seed(2))
    q = torch.randn(9, 4, 8)
    for runs in ([(160, tokens)], random_runs(rng, tokens, 4096), [(0, 100), (3200, 16), (1600, 80), (3232, 7)]):
        out, lse = block_table_kernels.attend(q, keys, values, runs, SCALE)
        want, want_lse = plain(q, keys, values, runs)
        torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)


def test_pages_are_the_blocks_of_the_runs() -> None:
    pages = _pages([[(64, 33)], [(0, 32), (96, 5)], []], 16, torch.device("cpu"))
    assert pages.table.tolist() == [[4, 5, 6], [0, 1, 6], [0, 0, 0]]
    assert pages.lengths.tolist() == [33, 37, 0]


@pytest.mark.parametrize("block_size", [16, 256])
def test_a_gpu_is_called_with_pages_where_its_kernel_reads_them(block_size: int) -> None:
    """Shapes only: the `meta` device stands for a GPU."""
    meta = torch.device("meta")
    keys = torch.empty(64 * 256, 2, 64, dtype=torch.bfloat16, device=meta)
    tables = [[(0, 300)], [(1024, 256), (512, 60)], []]
    plan = DecodeTables.build(tables, token_bytes=512, block_size=block_size, dtype=torch.bfloat16, device=meta)
    assert (plan.pages is not None) == (block_size == 256)
    if plan.pages is not None:
        assert plan.pages.table.shape == (3, 2)
        assert plan.pages.longest == 316
    q = torch.empty(3, 8, 64, dtype=torch.bfloat16, device=meta)
    out, lse = block_table_kernels.decode(q, keys, keys, plan, SCALE)
    assert (out.shape, out.dtype, lse.shape) == ((3, 8, 64), torch.float32, (3, 8))
    out, lse = block_table_kernels.attend(q, keys, keys, tables[1], SCALE)
    assert (out.shape, lse.shape, lse.dtype) == ((3, 8, 64), (3, 8), torch.float32)
