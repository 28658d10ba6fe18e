"""The dry run finds what a GPU would refuse, and names the module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Mistake -> what the dry run says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.dryrun.mistakes"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["mistake"]: one["report"]["error"] for one in answers}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("an index on the host", ("model, forward: aten::index_copy", "on cpu", "same device")),
        (
            "float32 into a bfloat16 product",
            ("linear_fc1, forward: aten::mm of float32", "the dtypes differ (megatron/core/"),
        ),
        ("the wrong shape of a kernel's argument", ("core_attention, backward", "expected shape", "14, 64")),
        (
            "a host buffer in a collective",
            ("gradients, forward", "all_reduce of a tensor [4] on cpu", "NCCL", "(megatron_vita/"),
        ),
    ],
)
def test_a_planted_mistake_is_found(errors: dict[str, str | None], mistake: str, words: tuple[str, ...]) -> None:
    assert errors["none"] is None
    message = errors[mistake] or "nothing was found"
    for one in words:
        assert one in message
