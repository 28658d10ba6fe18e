"""Sweeps and needles, from the command line to the report: what is asked, what is kept after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.sample import Sample
from megatron_vita.evaluation.report import write
from megatron_vita.evaluation.results import ResultFile
from megatron_vita.inference.engine import Engine
from tests.evaluation import published
from tests.evaluation.test_evaluate import asked as asked
from tests.inference.tiny import save_checkpoint, write_media
from tests.scripts import load_script

TOOL = load_script("tools/evaluate.py")
GRID = ["--needle", "visual", "text", "--frames", "3", "12", "--lengths", "150", "--depths", "2", "--samples", "1"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_checkpoint(folder)
    write_media(folder)
    lines = []
    for number, (text, media) in enumerate((("<video>\nWhich?", {"videos": ["video.mp4"]}), ("And?", {}))):
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "7"}]
        more = {"duration": ("short", "long")[number], "category": "c"}
        lines.append(json.dumps({"messages": talk} | media | more))
    (folder / "q.jsonl").write_text("\n".join(lines))
    (folder / "text.jsonl").write_text(lines[1])
    return folder


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn in test_report_tables, and take longer than everything here."""
    monkeypatch.setattr(write, "find_spec", lambda name: None)


def run(here: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    command = ["--model", str(here / "tiny"), "--output", str(output), "--max-new-tokens", "2", *flags]
    assert TOOL.main(command) == 0
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["data"], line["max_frames"] or 0, line["line"]))


def test_a_sweep_asks_the_same_questions_with_each_number_of_frames(
    here: Path, tmp_path: Path, asked: list[Sample], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(here / "q.jsonl")]
    few = run(here, tmp_path, *data, "--frames", "1", "3")
    assert [(line["max_frames"], line["line"]) for line in few] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    shown = {line["max_frames"]: line["prompt_tokens"] for line in few if line["line"] == 1}
    per_frame = (shown[3] - shown[1]) / 2
    assert per_frame >= 4, "tokens of a tile and its label"
    assert len(asked) == 4
    more = run(here, tmp_path, *data, "--frames", "3", "4")
    assert len(asked) == 6, "three frames were asked before; one frame is kept"
    assert [line["max_frames"] for line in more] == [1, 1, 3, 3, 4, 4]
    assert capsys.readouterr().out.splitlines()[-3].split()[2] == "3"
    plain = run(here, tmp_path, *data)
    assert len(asked) == 8
    assert [line["max_frames"] for line in plain] == [None, None, 1, 1, 3, 3, 4, 4]
    page = (tmp_path / "report.md").read_text()
    assert "| 4 frames" in page
    assert "| frames as trained |" in page
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["max_frames"], row["count"]) for row in rows] == [(1, 2), (3, 2), (4, 2), (None, 2)]
    assert list(rows[0]["duration"]) == ["short", "long"]


def test_needles_are_asked_and_kept(
    here: Path, tmp_path: Path, asked: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle; then the rest, and nothing twice. Clips are longer than the model's own most frames."""
    plain = ResultFile.add

    def killed(self: ResultFile, result: dict[str, Any]) -> None:
        plain(self, result)
        if len(self.results) == 2:
            raise KeyboardInterrupt

    one = ["--max-num-seqs", "1"]
    monkeypatch.setattr(ResultFile, "add", killed)
    command = ["--model", str(here / "tiny"), "--output", str(tmp_path / "out"), "--max-new-tokens", "2", *GRID, *one]
    assert TOOL.main(command) == 1
    monkeypatch.setattr(ResultFile, "add", plain)
    before = len(asked)
    lines = run(here, tmp_path / "out", *GRID, *one)
    assert len(asked) - before == 4
    names = ["needle text 150 tokens", "needle visual 12 frames", "needle visual 3 frames"]
    assert [line["data"] for line in lines] == [name for name in names for _ in range(2)]
    assert [line["max_frames"] for line in lines] == [None, None, 12, 12, 3, 3]
    assert [line["fields"]["depth"] for line in lines] == [0, 1] * 3
    assert {line["task"] for line in lines} == {"needle"}
    frames = {line["max_frames"]: line["prompt_tokens"] for line in lines if line["max_frames"]}
    assert frames[12] - frames[3] >= 9 * 4
    page = (tmp_path / "out/report.md").read_text()
    assert "| depth \\ frames | " in page
    assert "| depth \\ tokens | " in page
    again = run(here, tmp_path / "out", *GRID, *one)
    assert again == lines
    assert len(asked) - before == 4
    run(here, tmp_path / "out", *GRID, *one, "--depths", "3", "--samples", "2")
    assert len(asked) - before == 4 + 3 * (3 * 2 - 2), "what is new"


def test_a_benchmark_is_asked_in_each_wording(here: Path, tmp_path: Path, asked: list[Sample]) -> None:
    published.mmbench_tsv(tmp_path)
    flags = ["--benchmark", "mmbench", "--root", str(tmp_path)]
    lines = run(here, tmp_path / "out", *flags)
    other = run(here, tmp_path / "out", *flags, "--prompt-style", "vlmevalkit", "--max-new-tokens", "3")
    assert len(lines) == 3
    assert len(other) == len(asked) == 6
    assert {line["data"] for line in other} == {"mmbench", "mmbench, prompts of vlmevalkit"}
    assert {line["task"] for line in lines} == {"multiple_choice"}
    page = (tmp_path / "out/report.md").read_text()
    assert "## mmbench, prompts of vlmevalkit" in page
    assert "| questions |      2 |       2 |" in page, "a question whose options rotate is one"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "text.jsonl", "--frames", "2"], "no question of it shows a video. Leave out --frames."),
        (["--data", "q.jsonl", "--frames", "0"], "--frames 0: a video has at least one frame"),
        (["--needle", "visual", "--frames", "1"], "from 2 on"),
        (["--benchmark", "video-mme", "--root", "."], "Did you mean videomme?"),
        (["--benchmark", "videomme", "--root", "."], "no data file of videomme"),
        (["--benchmark", "ai2d", "--root", ".", "--prompt-style", "own"], "prompt style 'own' is not known"),
        (["--needle", "text", "--lengths", "5"], "--lengths 5: the needle"),
        (["--needle", "visual", "--frames", "4", "--haystack", "none"], "Check --haystack"),
        (["--needle", "visual", "--frames", "4", "--depths", "1.5"], "--depths 1.5"),
    ],
)
def test_what_cannot_be_asked(
    here: Path,
    tmp_path: Path,
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(Engine, "load", None)
    assert TOOL.main(["--model", str(here / "tiny"), "--output", str(tmp_path), *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "nothing to ask"),
        (["--needle", "visual"], "with --frames"),
        (["--needle", "text"], "go together"),
        (["--data", "q", "--lengths", "5"], "go together"),
        (["--data", "q", "--haystack", "h"], "go with --needle"),
        (["--needle", "text", "visual", "--lengths", "5", "--frames", "2", "--haystack", "h"], "one kind"),
        (["--data", "q", "--depths", "3"], "go with --needle"),
        (["--data", "q", "--samples", "3"], "go with --needle"),
        (["--needle", "text", "--lengths", "5", "--task", "anls"], "--task goes with --data"),
        (["--needle", "text", "--lengths", "5", "--frames", "8"], "texts have none"),
        (["--data", "q", "--samples", "0"], "at least 1"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        TOOL.main(["--model", "m", "--output", "o", *flags])
    assert usage.value.code == 2
    assert says in capsys.readouterr().err


def test_benchmarks_are_asked_by_their_names(here: Path, tmp_path: Path, asked: list[Sample]) -> None:
    """Pictures from a table, and parts of videos; answers are judged by the benchmark's task."""
    root = tmp_path / "downloads"
    published.mmbench_tsv(root / "mmbench")
    published.mvbench(root / "mvbench")
    shutil.copy(here / "video.mp4", root / "mvbench/video/star/Charades_v1_480/AB12.mp4")
    flags = ["--benchmark", "mmbench", "mvbench", "--root", str(root), "--category", "colour", "action_sequence"]
    lines = run(here, tmp_path / "out", *flags)
    only = "only colour and action_sequence"
    assert [(line["data"], line["line"]) for line in lines] == [
        (f"mmbench, {only}", 1), (f"mmbench, {only}", 2), (f"mmbench, {only}", 3), (f"mvbench, {only}", 2),
    ]  # fmt: skip
    assert {line["task"] for line in lines} == {"multiple_choice"}
    assert all(line["score"] in (0, 1) and "extracted" in line for line in lines)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {row["data"]: (row["count"], list(row["category"])) for row in summary} == {
        f"mmbench, {only}": (2, ["colour"]), f"mvbench, {only}": (1, ["action_sequence"]),
    }  # fmt: skip
    assert asked[-1].videos[0].start == 2.5
    run(here, tmp_path / "out", *flags)
    assert len(asked) == 4, "the table is read again, the answers hold"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--benchmark", "mmmu"], "--benchmark and --root"),
        (["--data", "q.jsonl", "--subtitles"], "go with --benchmark"),
        (["--data", "q.jsonl", "--prompt-style", "lmms_eval"], "go with --benchmark"),
        (["--benchmark", "mmmu", "--root", "r", "--task", "anls"], "--task goes with --data"),
        (["--benchmark", "mmmu", "--root", "r", "--media-root", "m"], "below --root"),
        ([], "give --data, --benchmark or --needle"),
    ],
)
def test_flags_of_benchmarks(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        TOOL.main(["--model", "m", "--output", "o", *flags])
    assert usage.value.code == 2
    assert says in capsys.readouterr().err
