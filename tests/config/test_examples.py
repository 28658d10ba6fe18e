"""Every recipe that is shipped loads and fits the ranks its comments name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vita.config import load_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RANKS = {"quickstart/run.yaml": 2, "quickstart/lm.yaml": 1, "long_vita_14b/run.yaml": 64}


@pytest.mark.parametrize("name", RANKS)
def test_recipe_loads_and_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.setenv(variable, "/data")
    load_run(EXAMPLES / name).check(RANKS[name])


def test_no_recipe_is_forgotten() -> None:
    recipes = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.yaml") if "\nmodel:" in path.read_text()}
    assert recipes == set(RANKS)


def test_the_long_vita_recipe_keeps_the_reference_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.setenv(variable, "/data")
    stages = load_run(EXAMPLES / "long_vita_14b/run.yaml").stages
    assert [stage.data.seq_length for stage in stages] == [32768, 16384, 131072, 1048576]
    assert [stage.optimizer.lr for stage in stages] == [1e-3, 1e-5, 5e-6, 5e-6]
    assert [stage.data.reset_per_document for stage in stages] == [True, True, False, False]
    assert [stage.train.train_iters for stage in stages] == [1000, 5000, 1000, 500]
