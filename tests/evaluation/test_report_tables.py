"""Tables, buckets and heat maps of results, against tables written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_vita.evaluation.report import write
from megatron_vita.evaluation.report.buckets import EDGES, by_bucket, duration
from megatron_vita.evaluation.report.summary import summarise, table
from megatron_vita.evaluation.report.tables import bucket_table, heat_table, markdown, total_of
from megatron_vita.evaluation.report.write import write_report
from megatron_vita.evaluation.score import Tally, verdict


def result(score: float = 1.0, **more: Any) -> dict[str, Any]:
    """A result line as evaluate writes it."""
    line = {
        "run": "r", "model": "m", "name": "m", "task": "exact_match", "data": "d.jsonl", "line": 1, "zero_tiles": False,
        "max_frames": None, "answer": "7", "expected": "7", "verdict": verdict(score), "score": score, "finished": True,
        "fields": {},
    }  # fmt: skip
    return line | more


def video(length: Any, score: float = 1.0, **more: Any) -> dict[str, Any]:
    return result(score, fields={"duration": length}, **more)


# -------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("short", "short"),
        ("15", "15"),
        (0, "0-8 s"),
        (8, "0-8 s"),
        (8.1, "8-15 s"),
        (15, "8-15 s"),
        (60, "15-60 s"),
        (600, "180-600 s"),
        (3600, "900-3600 s"),
        (3600.5, ">3600 s"),
    ],
)
def test_names_of_durations(value: Any, name: str) -> None:
    assert duration(value)[1] == name


@given(st.floats(0, 10_000))
def test_a_range_holds_its_seconds(seconds: float) -> None:
    (low, _), name = duration(seconds)
    assert low <= seconds
    assert name == ">3600 s" or seconds <= float(name.removesuffix(" s").split("-")[1])
    assert low in (0, *EDGES)


def test_buckets_are_in_order_and_leave_out_what_has_none() -> None:
    lines = [video("long", 0.0), video("short"), video("medium"), video("short", 0.5), result()]
    found = by_bucket(lines, "duration")
    assert {name: (tally.count, tally.score) for name, tally in found.items()} == {
        "short": (2, 1.5), "medium": (1, 1), "long": (1, 0),
    }  # fmt: skip
    assert list(found) == ["short", "medium", "long"]
    assert list(by_bucket([video(3600), video(10), video(200)], "duration")) == ["8-15 s", "180-600 s", "900-3600 s"]
    named = ["180-600 s", "8-15 s", "15-60 s", "long", "short"]
    assert list(by_bucket(map(video, named), "duration")) == ["short", "long", "8-15 s", "15-60 s", "180-600 s"]
    categories = [result(fields={"category": name}) for name in ("task 10", "task 9", "", None, "Task")]
    assert list(by_bucket(categories, "category")) == ["Task", "task 9", "task 10"]


@given(st.lists(st.tuples(st.one_of(st.floats(0, 5000), st.sampled_from(["short", "long", "x"])), st.floats(0, 1))))
def test_every_result_is_in_one_bucket(values: list[tuple[Any, float]]) -> None:
    lines = [video(length, score) for length, score in values]
    total = total_of(by_bucket(lines, "duration").values())
    assert (total.count, total.score) == (len(lines), pytest.approx(sum(score for _, score in values)))


# --------------------------------------------------------------------------------------------------------- tables


def test_a_markdown_table_by_hand() -> None:
    assert markdown(["a|b", "n"], [["long name", "1.5"], ["x", "10"]]) == (
        "| a\\|b      |   n |\n"
        "|-----------|----:|\n"
        "| long name | 1.5 |\n"
        "| x         |  10 |"
    )  # fmt: skip
    assert markdown(["a"], [["two\nlines"]]).splitlines()[-1].startswith("| two lines |"), "a row is one line"


def test_rows_are_frames_and_columns_are_durations() -> None:
    """Two of four short ones right, one of two long ones; Wilson's interval of 3 of 6 is 18.8 to 81.2."""
    few = [video("short", score) for score in (1, 1, 0, 0)] + [video("long", score) for score in (1, 0)]
    many = [video("short"), video("short"), video("short"), video("short", 0.5), video("long"), video("long")]
    assert bucket_table({("m", "8 frames"): few, ("m", "64 frames"): many}, "duration") == (
        "| m         | short |  long | overall | 95% interval |\n"
        "|-----------|------:|------:|--------:|-------------:|\n"
        "| 8 frames  |  50.0 |  50.0 |    50.0 |    18.8–81.2 |\n"
        "| 64 frames |  87.5 | 100.0 |    91.7 |    51.7–99.1 |\n"
        "| questions |     4 |     2 |       6 |              |"
    )


def test_several_models_that_were_asked_differently() -> None:
    said = bucket_table(
        {("a", ""): [video("short")], ("b", "8 frames"): [video("long", 0), video("short")]}, "duration"
    )
    assert said == (
        "| model       | short | long | overall | 95% interval |\n"
        "|-------------|------:|-----:|--------:|-------------:|\n"
        "| a           | 100.0 |    – |   100.0 |   20.7–100.0 |\n"
        "| b, 8 frames | 100.0 |  0.0 |    50.0 |     9.5–90.5 |\n"
        "| questions   |     1 |  0–1 |     1–2 |              |"
    )


def test_many_categories_are_rows() -> None:
    lines = [result(number % 2, fields={"category": f"c{number}"}) for number in range(9)]
    said = bucket_table({("m", ""): lines}, "category").splitlines()
    assert said[0] == "| category     | questions |         m |"
    assert said[3] == "| c1           |         1 |     100.0 |"
    assert said[-2:] == ["| overall      |         9 |      44.4 |", "| 95% interval |           | 18.9–73.3 |"]


def test_a_heat_table_by_hand() -> None:
    cells = {("0%", "8"): Tally(4, 3, 0, 3.0), ("100%", "8"): Tally(2, 2, 0, 2.0), ("0%", "16"): Tally(2, 0, 1, 0.0)}
    assert heat_table(cells, ["0%", "100%"], ["8", "16"], "depth \\ frames") == (
        "| depth \\ frames |                   8 |              16 |\n"
        "|----------------|--------------------:|----------------:|\n"
        "| 0%             |   75% (3/4, 30–95%) | 0% (0/2, 0–66%) |\n"
        "| 100%           | 100% (2/2, 34–100%) |               – |\n"
        "| all            |   83% (5/6, 44–97%) | 0% (0/2, 0–66%) |"
    )


def test_summary_has_buckets_and_frames() -> None:
    lines = [video("short"), video("long", 0, task="anls"), video("short", 0.5, max_frames=64)]
    rows = summarise(lines)
    assert [(row["max_frames"], row["count"], row["accuracy"]) for row in rows] == [(None, 2, 0.5), (64, 1, 0.5)]
    assert rows[0]["task"] == "exact_match, anls"
    assert {name: one["accuracy"] for name, one in rows[0]["duration"].items()} == {"short": 1, "long": 0}
    assert "category" not in rows[0]
    assert [line.split()[2] for line in table(rows).splitlines()] == ["frames", "seen", "64"]


# --------------------------------------------------------------------------------------------------------- report


def needles(kind: str, field: str) -> list[dict[str, Any]]:
    return [
        result(
            float(length == 8 or depth > 0), data=f"needle {kind} {length}", zero_tiles=zero,
            fields={"needle": kind, field: length, "depth": depth, "sample": sample},
        )
        for length in (8, 16) for depth in (0.0, 0.5, 1.0) for sample in range(2) for zero in (False, True)
    ]  # fmt: skip


def everything() -> list[dict[str, Any]]:
    swept = [video(length, data="mme", max_frames=most) for length in ("short", "long") for most in (8, 64)]
    sorted_ = [result(fields={"category": name}, data="eval/bench.jsonl") for name in "ab"]
    broken = result(0, verdict="unreadable", finished=False)
    return [*swept, *sorted_, broken, *needles("visual", "frames"), *needles("text", "tokens")]


def test_a_report_has_all_tables_and_plots(tmp_path: Path) -> None:
    assert write_report(tmp_path, everything())
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Evaluation\n\n## mme\n\nTask exact_match; accuracy in percent.\n\n| m ")
    for name in ("sweep_mme", "categories_bench", "needle_visual_m", "needle_text_m"):
        assert f"({name}.png)" in page
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 250
    assert "| 0%             | 100% (2/2, 34–100%) |     0% (0/2, 0–66%) |" in page
    assert "| 50%            | 100% (2/2, 34–100%) | 100% (2/2, 34–100%) |" in page
    assert page.count("With all tiles zeroed:") == 2
    assert "1 of 55 questions could not be read and count as wrong" in page
    assert "1 of 55 answers were cut" in page


def test_a_report_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "find_spec", lambda name: None)
    assert not write_report(tmp_path, everything())
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    page = (tmp_path / "report.md").read_text()
    assert "matplotlib is not installed (pip install 'megatron-vita[evaluate]')" in page
    assert "![" not in page


def test_models_and_files_of_one_name_are_their_paths(tmp_path: Path) -> None:
    twins = [result(model=f"{name}/x", name="x", data=f"{name}/q.jsonl", extracted=None) for name in "ab"]
    write_report(tmp_path, [*twins, result(model="c", name="c", data="d/r.jsonl", extracted="7")])
    page = (tmp_path / "report.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("##")] == ["## a/q.jsonl", "## b/q.jsonl", "## r"]
    assert "| a/x " in page
    assert "| b/x " in page
    assert page.count("Of 1 of 1 answers no option or value could be inferred") == 2
