"""The benchmarks of inference and of checkpoints run; what they say about time is not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="they read memory from /proc")]


def run(script: str, *arguments: str) -> list[str]:
    """Lines that a benchmark prints."""
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def test_figures_of_inference() -> None:
    lines = run("inference.py", "--quick")
    sections = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    assert sections == ["cache", "memory", "time", "batching", "prefix", "generate"]
    counted = [line for line in lines if line.startswith("TP ")]
    assert len(counted) == 5
    assert all(line.endswith(": kept") for line in counted), counted


def test_figures_of_checkpoints(tmp_path: Path) -> None:
    lines = run("checkpoint.py", "--quick", "--scratch", str(tmp_path))
    sections = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    assert sections == ["spread", "memory", "blocked", "throughput"]
    judged = [line for line in lines if line.endswith((": kept", ": MISSED"))]
    assert len(judged) == 8, "what does not depend on the size"
    assert all(line.endswith(": kept") for line in judged), judged
    assert not list(tmp_path.iterdir())


def test_the_masked_head_takes_a_longer_prompt_than_the_full_one(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    lines = run(
        "lm_head.py", "--memory", "220MiB", "--heads", "masked", "full", "--hidden-size", "128", "--layers", "1",
        "--longest", "512", "--plot", str(path),
    )  # fmt: skip
    rows = [line for line in lines if "|" in line][1:]
    assert len(rows) == 4, lines
    for row in rows:
        assert ("at least 512" in row) == (" masked " in row), lines
    if any("plot:" in line for line in lines):
        assert path.read_bytes().startswith(b"\x89PNG")
