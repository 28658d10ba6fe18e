"""Judging and counting."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.questions import read_questions
from megatron_vita.evaluation.report.summary import summarise, table
from megatron_vita.evaluation.results import ResultFile
from megatron_vita.evaluation.score import Tally, depth_band, verdict, wilson


def test_partial_scores_are_averaged_and_never_right() -> None:
    lines = [result(1, "right") | {"score": 1.0}, result(2, "partial") | {"score": 0.75}, result(3, "wrong")]
    tally = Tally.of([*lines, result(4, "right"), result(5, "unreadable")])  # lines without scores: of earlier versions
    assert (tally.count, tally.right, tally.unreadable) == (5, 2, 1)
    assert tally.accuracy == (1 + 0.75 + 0 + 1 + 0) / 5
    assert [verdict(score) for score in (1.0, 0.75, 0.0)] == ["right", "partial", "wrong"]


@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_holds_the_share_and_stays_in_bounds(a: int, b: int) -> None:
    right, count = min(a, b), max(a, b)
    low, high = wilson(right, count)
    assert 0 <= low <= high <= 1
    if count:
        assert low - 1e-12 <= right / count <= high + 1e-12
        assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low))


def test_a_circle_is_right_if_all_of_it_is() -> None:
    lines = [
        result(1, "right", circle=7),
        result(2, "wrong", circle=7),
        result(3, "right", circle=8),
        result(4, "right"),
    ]
    tally = Tally.of([*lines, result(5, "right", circle=7, model="n"), result(6, "right", circle=8)])
    assert (tally.count, tally.right) == (4, 3), "7 of m, 8 of m, a plain line, 7 of n"


def test_wilson_of_a_known_case() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901624, 0.9433178), abs=1e-6)


@given(st.floats(0, 1))
def test_every_depth_has_a_band(depth: float) -> None:
    band = depth_band(depth)
    assert 0 <= band <= 4
    assert band / 5 <= depth
    assert depth < (band + 1) / 5 or depth == 1 or depth == pytest.approx((band + 1) / 5)


def result(line: int, verdict: str, *, run: str = "r", model: str = "m", **fields: float) -> dict[str, object]:
    """A result line as evaluate writes it."""
    return {
        "run": run, "model": model, "name": model, "task": "exact_match", "data": "d.jsonl", "line": line,
        "zero_tiles": False, "answer": "7", "expected": "7", "verdict": verdict, "finished": True, "fields": fields,
    }  # fmt: skip


def test_summary_counts_by_depth() -> None:
    rows = summarise([result(1, "right", depth=0.0), result(2, "wrong", depth=1.0), result(3, "unreadable", depth=0.9)])
    assert len(rows) == 1
    assert (rows[0]["count"], rows[0]["right"], rows[0]["unreadable"]) == (3, 1, 1)
    assert [band["count"] for band in rows[0]["depth_bands"]] == [1, 0, 0, 0, 2]
    assert "33.3%" in table(rows)
    assert "1 unreadable" in table(rows)
    assert "depth_bands" not in summarise([result(1, "right")])[0]


def test_results_continue_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    file = ResultFile(path)
    file.add(result(1, "right"))
    file.add(result(2, "wrong"))
    file.close()
    with path.open("a") as torn:
        torn.write('{"run": "r", "mod')
    again = ResultFile(path)
    assert again.finished() == {("r", "d.jsonl", 1), ("r", "d.jsonl", 2)}
    again.add(result(3, "right"))
    again.close()
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_results_of_another_run_are_forgotten_only_where_the_new_run_stands(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "results.jsonl")
    for line in (1, 2):
        file.add(result(line, "right", run="old"))
        file.add(result(line, "right", run="other", model="n"))
    file.add(result(3, "unreadable", run="new"))
    assert file.forget({("m", "d.jsonl", False, None): {1: "new", 3: "new"}}) == (2, 1)
    file.add(result(1, "wrong", run="new"))
    file.close()
    assert ResultFile(tmp_path / "results.jsonl").finished() == {
        ("other", "d.jsonl", 1), ("other", "d.jsonl", 2), ("new", "d.jsonl", 1),
    }  # fmt: skip


def test_a_foreign_results_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(DataError, match="line 1: not an evaluation result"):
        ResultFile(tmp_path / "results.jsonl")


def test_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    talk = [
        {"role": "user", "content": "<image>\nWhat? a < b"},
        {"role": "assistant", "content": "One <image>"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two"},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"messages": talk, "images": ["a.png"], "depth": 0.5}) + "\n\n")
    (question,) = read_questions(file)
    assert question.expected == "Two"
    assert question.fields == {"depth": 0.5}
    assert [message.role for message in question.sample.messages] == ["user", "assistant", "user"]
    assert len(question.sample.messages[0].parts) == 2
    assert question.sample.messages[1].parts[0].text == "One <image>"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "bad_json"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "reference answer"),
        (
            '{"messages": [{"role": "user", "content": "<image>"}, {"role": "gpt", "content": "x"}], "images": []}',
            "media_count",
        ),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "bad_role"),
        (
            '{"messages": [{"role": "user", "content": "<image>"}, {"role": "gpt", "content": "x"}], "images": ["n"]}',
            "media_missing",
        ),
    ],
)
def test_bad_questions_name_their_record(tmp_path: Path, line: str, says: str) -> None:
    good = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}'
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=f"record 2: .*{says}"):
        read_questions(tmp_path / "q.jsonl")
    assert len(read_questions(tmp_path / "q.jsonl", limit=1)) == 1


def test_options_and_several_answers(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B"}]
    record = {
        "messages": talk,
        "options": ["cat", "dog"],
        "answers": ["B", "dog"],
        "category": "pets",
        "duration": 12.5,
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert (question.options, question.golds) == (("cat", "dog"), ("B", "dog"))
    assert question.fields == {"category": "pets", "duration": 12.5}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "q.parquet")
    (same,) = read_questions(tmp_path / "q.parquet")
    assert (same.options, same.golds, dict(same.fields)) == (question.options, question.golds, dict(question.fields))
    (tmp_path / "q.jsonl").write_text(json.dumps(record | {"options": "cat, dog"}) + "\n")
    with pytest.raises(DataError, match="record 1: `options` must be a list of texts"):
        read_questions(tmp_path / "q.jsonl")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no record"):
        read_questions(tmp_path / "q.jsonl")
