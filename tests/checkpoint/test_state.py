"""run.json: what was written is what is read, the stages before this one included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.checkpoint import RunState
from megatron_vita.checkpoint.history import DataSummary, SourceSummary
from megatron_vita.checkpoint.integrity import write_integrity
from megatron_vita.checkpoint.state import RUN_FILE
from megatron_vita.config import StageConfig
from megatron_vita.errors import CheckpointError

SOURCE = SourceSummary(name="a", read=3, used=2, rejected=1, truncated=0, tokens=50, tiles=4)
DATA = DataSummary(name="stage1", seq_length=64, layout="internvl", sources=(SOURCE,))


def first_stage() -> RunState:
    """Three steps from imported weights."""
    return RunState(
        stage=StageConfig(name="stage1"),
        iteration=3,
        consumed_packs=6,
        manifest_digest="5e" * 32,
        data=DATA,
        base_models={"llm": "Qwen/Qwen2.5-14B-Instruct"},
    )


def read_back(folder: Path, text: str) -> RunState:
    """run.json of a checkpoint that holds nothing else."""
    (folder / RUN_FILE).write_text(text)
    write_integrity(folder, {})
    return RunState.read(folder)


def test_a_state_with_a_history_comes_back(tmp_path: Path) -> None:
    before = first_stage()
    state = RunState(
        stage=StageConfig(name="stage2"),
        iteration=1,
        manifest_digest="6f" * 32,
        base_models=before.base_models,
        earlier=before.history,
    )
    assert read_back(tmp_path, state.to_json()) == state
    assert [(one.recipe["name"], one.iteration, one.data) for one in state.history] == [
        ("stage1", 3, DATA),
        ("stage2", 1, None),
    ]


def test_weights_that_took_no_step_are_no_stage() -> None:
    assert RunState(stage=StageConfig(), iteration=0).history == ()


def test_a_state_of_an_earlier_release_has_no_history(tmp_path: Path) -> None:
    values = json.loads(first_stage().to_json())
    for name in ("data", "base_models", "earlier"):
        del values[name]
    state = read_back(tmp_path, json.dumps(values))
    assert (state.data, state.base_models, state.earlier, len(state.history)) == (None, {}, (), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", 5),
        ("data", {"name": "a"}),
        ("data", {"name": "a", "seq_length": "long", "layout": "internvl", "sources": []}),
        ("data", {"name": "a", "seq_length": 1, "layout": "internvl", "sources": [{"name": "x"}]}),
        ("base_models", 5),
        ("earlier", [{"recipe": 5}]),
        ("earlier", 5),
    ],
)
def test_a_damaged_history_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    values = json.loads(first_stage().to_json())
    with pytest.raises(CheckpointError, match=RUN_FILE):
        read_back(tmp_path, json.dumps({**values, name: value}))
