"""The quickstart's report, from made-up ledgers and results: every page is written, whatever is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.scripts import load_script


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load_script("examples/quickstart/report.py")


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(run: Path) -> None:
    """A run of four stages, of which the last was asked pictures and needles; frames are folders of pictures here."""
    for stage in range(1, 5):
        lines = [
            {"stage": f"stage{stage}", "iteration": i, "loss": None if i == 3 else 5 / i, "seconds": 0.1}
            for i in range(1, 4 + stage)
        ]
        write_lines(run / f"save/stage{stage}/ledger.jsonl", lines)
    (run / "data").mkdir()
    results = []
    for kind, extra in (
        ("digits", {}),
        ("needle_8", {"frames": 8, "depth": 0.0}),
        ("needle_16", {"frames": 16, "depth": 1.0}),
    ):
        talk = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "7"}]
        Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(run / "data" / f"{kind}.png")
        record = {"messages": talk, "images": [f"{kind}.png"] * extra.get("frames", 1)}
        write_lines(run / f"data/eval_{kind}.jsonl", [record | extra] * 3)
        for zero in (False, True):
            results += [
                {
                    "run": "r", "model": "m", "name": "stage4", "task": "exact_match", "line": line, "zero_tiles": zero,
                    "data": f"elsewhere/eval_{kind}.jsonl", "answer": "7" * line, "expected": "7",
                    "verdict": "right" if line == 1 else "wrong", "finished": True, "fields": extra,
                }
                for line in (1, 2, 3)
            ]  # fmt: skip
    write_lines(run / "eval/results.jsonl", results)


def test_all_pages(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    assert report.main(["--run", str(tmp_path)]) == 0
    page = (tmp_path / "report/report.md").read_text()
    for name in ("loss.png", "needle.png", "answers.png"):
        assert name in page
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 300
    said = capsys.readouterr()
    assert "needle 16, tiles zeroed" in said.out
    assert "**33.3%**" in page
    assert said.err == ""
    numbers = json.loads((tmp_path / "report/accuracy.json").read_text())
    assert {(one["set"], one["zero_tiles"]) for one in numbers} == {
        (kind, zero) for kind in ("digits", "needle_8", "needle_16") for zero in (False, True)
    }


def test_needle_cells_count_by_band(report: ModuleType, tmp_path: Path) -> None:
    make_run(tmp_path)
    results = [r for r in report.read_results([tmp_path / "eval"]) if not r["zero_tiles"]]
    cells = report.needle_cells(results)
    assert {key: (tally.right, tally.count) for key, tally in cells.items()} == {(8, 0): (1, 3), (16, 4): (1, 3)}


def test_smoothing_keeps_a_constant(report: ModuleType) -> None:
    np.testing.assert_allclose(report.smooth(np.full(9, 3.5), 4.0), 3.5)


def test_an_empty_run_says_what_is_missing(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--run", str(tmp_path)]) == 0
    assert "no loss curve" in capsys.readouterr().err
    assert "Left out: no accuracies" in (tmp_path / "report/report.md").read_text()
