"""The README's example of a dataset of one's own, run as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vita.data.shards.reader import ShardSet
from tests.data.kit import picture, tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]


def own_dataset_example() -> str:
    """The indented lines that write receipts.jsonl and own.yaml and compile them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    (block,) = [block for block in blocks if "own.yaml" in block]
    return "".join(line[4:] for line in block.splitlines(keepends=True))


@pytest.mark.slow
def test_a_dataset_of_ones_own_compiles_as_printed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0001.png").write_bytes(picture(640, 480))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    script = re.sub(r"^python ", f"{sys.executable} ", own_dataset_example(), flags=re.MULTILINE)
    environment = {
        **os.environ,
        "TOKENIZER": str(tokenizer_folder(tmp_path / "tokenizer")),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-e"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "12.50" in done.stdout
    shards = ShardSet(str(tmp_path / "shards/own"))
    assert shards.num_samples == 1
    assert len(shards.sample_tiles(0)) > 1
