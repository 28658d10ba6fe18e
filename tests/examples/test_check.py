"""The quickstart's check breaks a promise for each way in which a run can fall short."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load_script

Line = dict[str, Any]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_script("examples/quickstart/check.py")


def lines(stage: str, data: str, count: int, right: float, *, zeroed: bool = False) -> list[Line]:
    """Results of one evaluation: `right` of every ten answers in a row are right."""
    return [
        {
            "model": f"runs/stage2_of_mine/save/{stage}",
            "data": f"data/eval_{data}.jsonl",
            "line": number + 1,
            "zero_tiles": zeroed,
            "verdict": "right" if number % 10 < 10 * right else "wrong",
            "fields": {"frames": 64, "depth": number / (count - 1)},
        }
        for number in range(count)
    ]


def good() -> dict[str, list[Line]]:
    return {
        "stages": lines("stage2", "digits", 360, 0.9) + lines("stage4", "digits", 360, 0.9),
        "final": lines("stage4", "needle_64", 500, 0.8),
        "blind": lines("stage4", "needle_64", 500, 0.1, zeroed=True),
    }


def broken(check: ModuleType, run: Path, results: dict[str, list[Line]]) -> list[str]:
    for name, content in results.items():
        (run / "eval" / name).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in content)
        (run / "eval" / name / "results.jsonl").write_text(text)
    return [promise.says for promise in check.check_learning(run) if not promise.holds]


def test_a_good_run_keeps_every_promise(check: ModuleType, tmp_path: Path) -> None:
    assert broken(check, tmp_path, good()) == []


def _wrong_in_the_middle(results: dict[str, list[Line]]) -> None:
    for line in results["final"]:
        if 0.4 < line["fields"]["depth"] < 0.6:
            line["verdict"] = "wrong"
        elif line["fields"]["depth"] < 0.4:
            line["verdict"] = "right"


def _nothing_in_the_middle(results: dict[str, list[Line]]) -> None:
    for line in results["final"]:
        line["fields"]["depth"] *= 0.2 if line["line"] % 2 else 1.0
        if 0.4 <= line["fields"]["depth"] < 0.6:
            line["fields"]["depth"] = 0.1


@pytest.mark.parametrize(
    ("spoil", "promise"),
    [
        (lambda r: r.update(final=lines("stage4", "needle_64", 500, 0.7)), "64-frame needles"),
        (lambda r: r.update(blind=lines("stage4", "needle_64", 500, 0.2, zeroed=True)), "zeroed tiles"),
        (lambda r: r.update(blind=[]), "zeroed tiles"),
        (lambda r: r.update(blind=lines("stage4", "needle_64", 20, 0.1, zeroed=True)), "at least 360"),
        (lambda r: r.update(final=r["final"][:250] * 2), "at least 360"),
        (lambda r: r.update(stages=lines("stage2", "digits", 360, 0.9)), "digits after stage 4"),
        (
            lambda r: r.update(stages=lines("stage2", "digits", 360, 0.9) + lines("stage4", "digits", 360, 0.8)),
            "digits after stage 4",
        ),
        (
            lambda r: r.update(stages=lines("stage2", "digits", 360, 0.8) + lines("stage4", "digits", 360, 0.9)),
            "held-out digits",
        ),
        (_wrong_in_the_middle, "each of five"),
        (_nothing_in_the_middle, "each of five"),
    ],
)
def test_whatever_falls_short_breaks_a_promise(
    check: ModuleType, tmp_path: Path, spoil: Callable[[dict[str, list[Line]]], None], promise: str
) -> None:
    results = good()
    spoil(results)
    assert any(says.startswith(promise) or promise in says for says in broken(check, tmp_path, results))
