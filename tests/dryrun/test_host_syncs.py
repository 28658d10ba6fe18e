"""What counts as a wait of the host for the GPU; `meta` stands for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_vita.dryrun.memory import Memory
from megatron_vita.dryrun.mode import DryRunMode, FakeOperationError, _is_pinned, counting_pairs
from megatron_vita.dryrun.modules import ModulePath

META = torch.device("meta")
X, MASK = torch.empty(4, device=META), torch.empty(4, dtype=torch.bool, device=META)
HOST, NUMBER = torch.zeros(4), torch.tensor(0.0)
TO = {"device": META}


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "waits"),
    [
        ("_local_scalar_dense", (X[0],), {}, True),
        ("_local_scalar_dense", (NUMBER,), {}, False),
        ("nonzero", (MASK,), {}, True),
        ("_unique2", (X,), {}, True),
        ("index", (X, [MASK]), {}, True),
        ("index", (X, [X.long()]), {}, False),
        ("index_put_", (X, [MASK], NUMBER), {}, False),  # masked_fill
        ("index_put_", (X, [MASK], X[0]), {}, True),
        ("index_put", (X, [MASK], X), {}, True),
        ("index_put_", (X, [X.long()], X), {}, False),
        ("index", (X, [HOST.long()]), {}, True),
        ("_index_put_impl_", (X, [MASK], X), {}, True),
        ("repeat_interleave", (X.long(),), {}, True),
        ("repeat_interleave", (X.long(),), {"output_size": 9}, False),
        ("_to_copy", (HOST,), TO, True),
        ("_to_copy", (HOST,), {**TO, "non_blocking": True}, True),  # not page-locked
        ("_to_copy", (HOST[:0],), TO, False),
        ("_to_copy", (X,), {"device": torch.device("cpu")}, True),
        ("_to_copy", (X,), {"dtype": torch.float64}, False),
        ("copy_", (X, HOST), {}, True),
        ("copy_", (X, X), {}, False),
        ("copy_", (HOST, X), {"non_blocking": True}, True),  # to memory that is not page-locked
        ("_to_copy", (X,), {"device": torch.device("cpu"), "non_blocking": True}, False),
        ("add", (X, NUMBER), {}, False),
    ],
)
def test_reads_and_copies(name: str, args: Any, kwargs: dict[str, Any], waits: bool) -> None:
    mode = DryRunMode(META, None, None, fake=True)  # type: ignore[arg-type]
    mode._find_sync(f"aten::{name}", args, kwargs)
    assert [one.count for one in mode.host_syncs] == [1] * waits


def test_values_of_the_host_are_read() -> None:
    known = torch.tensor(5)
    with FakeTensorMode(allow_non_fake_inputs=True), _watching():
        assert known.item() == 5
        assert torch.tensor(7).item() == 7
        assert (torch.ones(2).sum().item(), torch.ones(2).isnan().any().item()) == (1, False)
        assert _is_pinned(torch.empty(4, pin_memory=True)[1:])
        assert not _is_pinned(torch.empty(4))


def test_a_result_whose_size_depends_on_values_names_the_wait() -> None:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _watching(),
        pytest.raises(FakeOperationError, match=r"outside the model, forward: aten::nonzero .*would wait"),
    ):
        torch.ones(2, dtype=torch.bool, device=META).nonzero()


def test_products_in_place_count_as_much() -> None:
    a, b, c = (torch.empty(shape, device=META) for shape in ((2, 3), (3, 4), (2, 4)))
    with _watching() as mode:
        torch.addmm(c, a, b)
        once = mode.flops
        c.addmm_(a, b)
        torch.mm(a, b, out=c)
        c[None].baddbmm_(a[None], b[None])
    assert (once, mode.flops) == (2 * 2 * 3 * 4, 4 * once)


def test_products_of_a_reference_kernel_count_once() -> None:
    query, blocks = torch.empty(5, 2, 8, device=META), SimpleNamespace(pairs=15)
    with _watching() as mode:
        counting_pairs(mode, lambda query, blocks: query[:, 0] @ query[:, 0].t(), products=2)(query, blocks)
    assert (mode.flops, mode.attention_calls) == (2 * 2 * 15 * 2 * 8, 1)


def _watching() -> DryRunMode:
    modules = ModulePath()
    return DryRunMode(META, modules, Memory(META, modules), fake=True)
