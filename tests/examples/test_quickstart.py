"""The quickstart's commands: as many steps as it counts, and evaluations whose flags say what they should."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vita.inference.arguments import engine_settings
from tests.scripts import load_script


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_script("examples/quickstart/quickstart.py")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with what its last steps look into."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eval_digits.jsonl").write_text(json.dumps({"images": ["images/one.png"]}) + "\n")
    return tmp_path


def evaluations(quickstart: ModuleType, run: Path, **settings: bool) -> dict[str, argparse.Namespace]:
    """Name of the output folder -> parsed command line."""
    parse = load_script("tools/evaluate.py").arguments
    commands = [c for step in quickstart.steps(str(run), seed=1, **settings) for lane in step.lanes for c in lane]
    lines = [parse(c[c.index("tools/evaluate.py") + 1 :]) for c in commands if "tools/evaluate.py" in c]
    names = [line.output.name for line in lines]
    assert len(set(names)) == len(names), "two evaluations in one folder would drop each other's answers"
    return dict(zip(names, lines, strict=True))


@pytest.mark.parametrize("needle", [False, True])
def test_as_many_steps_as_are_counted(quickstart: ModuleType, run: Path, needle: bool) -> None:
    found = list(quickstart.steps(str(run), seed=1, short=False, needle=needle))
    assert len({step.name for step in found}) == len(found) == quickstart.NUMBER_OF_STEPS + needle


def test_longer_videos_are_asked_under_context_parallelism(quickstart: ModuleType, run: Path) -> None:
    asked = evaluations(quickstart, run, short=False, needle=True)
    for part, frames in (("512", quickstart.LONGER), ("4096", quickstart.LONGEST)):
        for name in (f"long_{part}", f"long_{part}_yarn"):
            settings = engine_settings(asked[name])
            assert settings.context_parallel_size == settings.world_size == 2
            assert settings.max_frames == max(quickstart.LONGEST)
            assert settings.rope_scaling == (quickstart.YARN if "yarn" in name else None)
            assert [Path(path).stem for path in asked[name].data] == [f"eval_long_needle_{n}" for n in frames]
    for short in (False, True):
        usual = [name for name in evaluations(quickstart, run, short=short) if name.startswith("long")]
        assert usual == ["long_512_yarn"], "what is asked every time costs less than a minute"
