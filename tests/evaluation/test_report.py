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


def add_long(run: Path, frames: int, right: int, count: int, scaling: dict[str, object] | None) -> None:
    """Answers about videos longer than any of training; each evaluation has its own folder."""
    fields = {"frames": frames, "depth": 0.5}
    lines: list[dict[str, object]] = [
        {
            "run": "r", "model": "m", "name": "stage4", "task": "exact_match", "line": line + 1, "zero_tiles": False,
            "data": f"elsewhere/eval_long_needle_{frames}.jsonl", "answer": "7", "expected": "7",
            "verdict": "right" if line < right else "wrong", "finished": True, "fields": fields,
            "prompt_tokens": 13 * frames, "prefill_seconds": 0.5 + line,
            "overrides": {"max_frames": 4096} | ({"rope_scaling": scaling} if scaling else {}),
        }
        for line in range(count)
    ]  # fmt: skip
    write_lines(run / f"eval/long_{frames}{'_yarn' if scaling else ''}/results.jsonl", lines)


def test_all_pages(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    add_long(tmp_path, 128, 1, 3, None)
    assert report.main(["--run", str(tmp_path)]) == 0
    page = (tmp_path / "report/report.md").read_text()
    for name in ("loss.png", "needle.png", "longer.png", "answers.png"):
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


def test_longer_videos_have_a_curve_of_their_own(report: ModuleType, tmp_path: Path) -> None:
    make_run(tmp_path)
    assert report.main(["--run", str(tmp_path)]) == 0
    numbers = (tmp_path / "report/accuracy.json").read_text()
    assert "Longer than trained" not in (tmp_path / "report/report.md").read_text()
    yarn = {"rope_type": "yarn", "factor": 64.0}
    for frames, right, scaling in ((128, 1, None), (1024, 0, None), (128, 3, yarn)):
        add_long(tmp_path, frames, right, 3, scaling)
    assert report.main(["--run", str(tmp_path)]) == 0
    page = (tmp_path / "report/report.md").read_text()
    for row in (
        "| as trained | 128 | 1,664 | 3 | **33%** (6%–79%) | 1.50 s | 1,109 |",
        "| as trained | 1,024 | 13,312 | 3 | **0%** (0%–56%) | 1.50 s | 8,875 |",
        "| YaRN ×64 | 128 | 1,664 | 3 | **100%** (44%–100%) | 1.50 s | 1,109 |",
    ):
        assert row in page
    with Image.open(tmp_path / "report/longer.png") as picture:
        assert min(picture.size) > 300
    assert (tmp_path / "report/accuracy.json").read_text() == numbers, "the table of stages is about other questions"


def test_the_trained_length_is_that_of_the_data(report: ModuleType) -> None:
    data = load_script("examples/quickstart/make_data.py")
    quickstart = load_script("examples/quickstart/quickstart.py")
    assert report.TRAINED_FRAMES == data.TRAINED_FRAMES
    assert quickstart.YARN["factor"] * data.TRAINED_FRAMES == quickstart.LONGEST[-1]
    assert [frames for frames, _ in data.Sizes().long_needles] == [*quickstart.LONGER, *quickstart.LONGEST]
