"""Commands in the documents name files, subcommands and flags that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from megatron_vita.config.load import flag_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Indented lines of all documents that run one of our scripts, continuation lines joined."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        found += [line.strip() for line in text.splitlines() if re.match(r"    (python|torchrun) .*\.py", line)]
    return found


@lru_cache
def help_of(script: str, *subcommand: str) -> str:
    """What a script says about itself."""
    run = subprocess.run(
        [sys.executable, script, *subcommand, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_documents_hold_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command_names_what_exists(command: str) -> None:
    words = [word.strip("[]") for word in shlex.split(re.sub(r"\s\.\.\.", " ", command))]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1 :]
    assert (ROOT / script).is_file(), f"{script} does not exist"
    subcommand = [word for word in rest[:1] if script.endswith("convert_ckpt.py")]
    subcommand += [word for word in rest if word == "--dry-run"]
    known = help_of(script, *subcommand)
    takes_settings = script.endswith(("pretrain_vita.py", "plan.py"))
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        in_settings = takes_settings and flag in flag_names()
        assert in_settings or re.search(rf"{flag}\b", known), f"{script} has no flag {flag}"
    for word in rest:
        if word.startswith("examples/"):
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize(
    "target", ["quickstart", "quickstart-short", "needle", "test", "test-fast", "test-newest", "lint", "format"]
)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
