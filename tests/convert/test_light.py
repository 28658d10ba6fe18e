"""Converting moves bytes: it must pay neither for megatron-core's imports nor for torch's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.synthetic import write_wide_qwen2

WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
from megatron_vita.convert import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line where an import of torch is an error."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, *arguments]
    return subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)


@pytest.mark.slow
def test_a_decoder_goes_both_ways_without_torch(tmp_path: Path) -> None:
    write_wide_qwen2(tmp_path / "hf", 0.1, layers=1, width=1024)
    done = without_torch("import", "--llm", str(tmp_path / "hf"), "--output", str(tmp_path / "ckpt"))
    assert done.returncode == 0, done.stderr
    done = without_torch(
        "export", "--checkpoint", str(tmp_path / "ckpt"), "--output", str(tmp_path / "out"), "--format", "llm"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_mistake_is_told_without_torch(tmp_path: Path) -> None:
    done = without_torch("import", "--model", str(tmp_path / "nothing"), "--output", str(tmp_path / "ckpt"))
    assert done.returncode == 2
    assert "no such folder" in done.stderr
