"""Collectives give the same result for inputs of any strides."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_vita
from megatron_vita.parallel import collectives
from tests.ranks import run_ranks

ROOT = Path(megatron_vita.__file__).parent


def _values(rank: int, count: int) -> torch.Tensor:
    """float64 [count, 3, 2], different for every rank and element."""
    return rank * 1000 + torch.arange(count * 6, dtype=torch.float64).view(count, 3, 2)


def _check_strides() -> None:
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    views = {
        "contiguous": lambda x: x,
        "dense, in another order": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "every other token": lambda x: x.repeat_interleave(2, dim=0)[::2],
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, 2),
    }
    for name, view in views.items():
        all_ranks = [view(_values(one, 4)) for one in range(size)]
        local = view(_values(rank, 4))  # rank 0 sends another memory order than the others
        local = local if rank else local.contiguous()
        got = collectives.gather_tokens(local, group).wait()
        torch.testing.assert_close(got, torch.cat(all_ranks), msg=f"gather_tokens, {name}")
        got = collectives.ring_send_recv(local, group, tag=3).wait()
        torch.testing.assert_close(got, all_ranks[rank - 1], msg=f"ring_send_recv, {name}")
        each = 4 // size
        got = collectives.exchange_tokens(local, [each] * size, [each] * size, group)
        want = torch.cat([one[rank * each : (rank + 1) * each] for one in all_ranks])
        torch.testing.assert_close(got, want, msg=f"exchange_tokens, {name}")
        got = collectives.reduce_scatter_tokens(local, group)
        want = torch.stack(all_ranks).sum(0)[rank * each : (rank + 1) * each]
        torch.testing.assert_close(got, want, msg=f"reduce_scatter_tokens, {name}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_strides_change_nothing(ranks: int) -> None:
    run_ranks(ranks, _check_strides)


def _check_two_rings() -> None:
    """Two messages to the same neighbour, waited for in the other order than sent."""
    group = dist.group.WORLD
    rank = dist.get_rank()
    before = (rank - 1) % dist.get_world_size()
    first = collectives.ring_send_recv(_values(rank, 2), group, tag=0)
    second = collectives.ring_send_recv(_values(rank, 5) + 0.5, group, tag=1)
    torch.testing.assert_close(second.wait(), _values(before, 5) + 0.5)
    torch.testing.assert_close(first.wait(), _values(before, 2))


def test_two_rings_at_once_do_not_mix() -> None:
    run_ranks(2, _check_two_rings)


def _check_in_place() -> None:
    group = dist.group.WORLD
    with pytest.raises(ValueError, match="strides"):
        collectives.reduce_(torch.ones(4, 3).t(), group)
    ones = torch.ones(3, 4)
    collectives.reduce_(ones, group)
    assert (ones == dist.get_world_size()).all()


def test_reducing_in_place_refuses_strides() -> None:
    run_ranks(2, _check_in_place)


COLLECTIVES = {
    name
    for name in dir(dist)
    if name.startswith(("all_", "reduce", "broadcast", "send", "recv", "isend", "irecv", "batch_", "gather", "scatter"))
    and not name.endswith(("_object", "_object_list"))
    and callable(getattr(dist, name))
}
FILES = sorted(path for package in ("parallel", "models") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tensors_are_sent_by_the_collectives_of_parallel_only(path: Path) -> None:
    if path.name == "collectives.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            assert owner not in ("dist", "torch.distributed"), f"{path}:{node.lineno}: use parallel/collectives.py"
