"""tools/plan.py as people run it: tables, exit statuses, and dry runs where they are possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_vita.errors import ConfigError
from megatron_vita.planning.measure import Measured
from tests.scripts import load_script

RECIPE = "examples/long_vita_0.5b/run.yaml"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """plan("--gpus", "8") -> exit status, output, errors."""
    for variable in ("RUN", "SHARDS", "START", "TOKENIZER"):
        monkeypatch.delenv(variable, raising=False)  # sizes need no paths
    script = load_script("tools/plan.py")

    def run(*arguments: str, **replaced: Any) -> tuple[int, str, str]:
        for name, value in replaced.items():
            monkeypatch.setattr(script, name, value)
        monkeypatch.setattr("sys.argv", ["plan.py", "--config", RECIPE, *arguments])
        status = script.main()
        return (status, *capsys.readouterr())

    return run


def test_every_stage_has_a_line(plan: Any) -> None:
    status, out, _ = plan("--gpus", "8", "--quick")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("stage")] == [
        "stage", "stage1", "stage2", "stage3", "stage4",
    ]  # fmt: skip
    assert "assumed reached: 70% in matrix products" in out
    assert "every stage fits into 90% of 80 GiB" in out


def test_a_stage_that_does_not_fit(plan: Any) -> None:
    status, out, _ = plan("--gpus", "8", "--quick", "--gpu-memory", "24", "--stage", "3")
    assert status == 1
    assert "over 90% of 24 GiB: stage3 by " in out


def test_settings_are_flags_and_memory_the_hardwares(plan: Any) -> None:
    status, out, _ = plan(
        "--gpus", "8", "--quick", "--stage", "3", "--hardware", "a100-40", "--context-parallel-size", "8"
    )
    assert status == 0
    assert "tp1 cp8 p2p dp1 no recomputation" in out
    assert "fits into 90% of 40 GiB" in out


def test_known_speed_replaces_the_assumptions(plan: Any) -> None:
    _, out, _ = plan("--gpus", "8", "--quick", "--stage", "1", "--tflops", "400")
    assert "40% in matrix products, 40% in attention" in out


def test_search(plan: Any) -> None:
    status, out, _ = plan("--gpus", "8", "--quick", "--stage", "3", "--search")
    assert status == 0
    assert "   1. tp1 cp" in out
    assert "limited by attention" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "train.global_batch_size=512 is not a multiple of micro_batch_size x data ranks=3"),
        (["--gpus", "8", "--stage", "5"], "the recipe has stages 1 to 4"),
        (["--gpus", "8", "--hardware", "V100"], "no figures are known of 'V100'"),
    ],
)
def test_what_cannot_be_planned(plan: Any, arguments: list[str], message: str) -> None:
    status, _, error = plan("--quick", *arguments)
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_dry_runs_correct_and_decide(plan: Any) -> None:
    """A dry run that finds 100 GiB: the stage does not fit, whatever the formulas say."""
    asked = []

    def found(jobs: Any, gpus: int) -> list[Measured]:
        asked.extend((stage.model.num_layers, rank) for stage, rank in jobs)
        return [Measured(100 * 1024**3, 1e15, 1, 1000) for _ in jobs]

    status, out, _ = plan("--gpus", "8", "--stage", "2", _dry_runs=found)
    assert asked == [(2, 0), (4, 0), (24, 0)]
    assert "of all layers: 100.00 GiB" in out
    assert status == 1


def test_without_a_compiler_it_says_so(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("the dry run needs a C++ compiler.")

    monkeypatch.setattr("megatron_vita.dryrun.jobs.run_jobs", refuse)
    status, _, error = plan("--gpus", "8", "--stage", "1")
    assert status == 2
    assert error == "plan: the dry run needs a C++ compiler. Or plan with --quick, by formulas alone.\n"
