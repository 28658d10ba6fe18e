"""What counts as a wait of the host for the GPU; `meta` stands for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vita.dryrun.mode import DryRunMode

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
        ("repeat_interleave", (X.long(),), {}, True),
        ("repeat_interleave", (X.long(),), {"output_size": 9}, False),
        ("_to_copy", (HOST,), TO, True),
        ("_to_copy", (HOST,), {**TO, "non_blocking": True}, True),  # not page-locked
        ("_to_copy", (HOST[:0],), TO, False),
        ("_to_copy", (X,), {"device": torch.device("cpu")}, True),
        ("_to_copy", (X,), {"dtype": torch.float64}, False),
        ("copy_", (X, HOST), {}, True),
        ("copy_", (X, X), {}, False),
        ("add", (X, NUMBER), {}, False),
    ],
)
def test_reads_and_copies(name: str, args: Any, kwargs: dict[str, Any], waits: bool) -> None:
    mode = DryRunMode(META, None, None, fake=True)  # type: ignore[arg-type]
    mode._find_sync(f"aten::{name}", args, kwargs)
    assert [one.count for one in mode.host_syncs] == [1] * waits
