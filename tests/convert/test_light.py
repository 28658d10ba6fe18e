"""Converting needs no trainer: its command line must not pay for megatron-core's imports."""

from __future__ import annotations

import subprocess
import sys


def test_the_command_line_does_without_megatron_core() -> None:
    code = "import sys, megatron_vita.convert.cli; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=60).returncode == 0
