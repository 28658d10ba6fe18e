"""Conversion of a model of several gigabytes in a process that may not use more memory than was promised."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vita.convert import open_model
from tests.convert.synthetic import write_wide_qwen2

_LIMITED = """
import os, resource, sys
from megatron_vita.convert import cli

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

start = status("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (start + int(sys.argv[1]),) * 2)
code = cli.main(sys.argv[2:])
print("peak", status("VmHWM"))
sys.exit(code)
"""


def convert(limit: int, *arguments: object) -> int:
    """Run the converter where it may allocate `limit` bytes beyond what its imports did.

    Returns:
        The peak of its resident set, in bytes.
    """
    command = [sys.executable, "-c", _LIMITED, str(limit), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_stays_below_a_gibibyte_and_two_tensors(tmp_path: Path) -> None:
    size = write_wide_qwen2(tmp_path / "hf", 2.0)
    assert size > 2.4e9
    tensors = open_model(tmp_path / "hf").tensors
    largest = sorted(math.prod(tensors.shape(name)) * 2 for name in tensors)[-2:]
    bound = (1 << 30) + sum(largest)
    assert bound < size / 1.3, "a model that fits as a whole would prove nothing"
    # The system enforces much less than the promise, and less than one tensor of some: what threads reserve and do not
    # use counts here too, and imports (some 300 MiB) do not.
    limit = 640 << 20
    imported, exported = tmp_path / "ckpt", tmp_path / "again"
    peaks = [
        convert(limit, "import", "--llm", tmp_path / "hf", "--output", imported, "--workers", 2),
        convert(limit, "export", "--checkpoint", imported, "--output", exported, "--format", "llm", "--workers", 2),
    ]
    assert max(peaks) < bound, [peak >> 20 for peak in peaks]
