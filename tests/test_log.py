"""What torchrun says last is what went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_torchrun_ends_with_our_error_and_status(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text("modle: {}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launch, str(ROOT / "pretrain_vita.py"), "--config", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    cause = done.stderr.partition("Root Cause")[2]
    assert "exitcode  : 2" in cause
    assert f"{recipe}: unknown key `modle`. Did you mean `model`?" in cause
    assert "To enable traceback see" not in cause
