"""Evaluation: right counts, nothing asked twice, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_vita.data.compile import run as preprocess
from megatron_vita.data.loading.packed_batch import read_tiles
from megatron_vita.data.sample import Sample
from megatron_vita.data.shards.reader import ShardSet
from megatron_vita.errors import CheckpointError, ConfigError, DataError, VitaError
from megatron_vita.evaluation import processes
from megatron_vita.evaluation.evaluate import EvalSettings, evaluate
from megatron_vita.evaluation.questions import read_questions
from megatron_vita.evaluation.results import ResultFile
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prepare import Preparation
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling_config import GREEDY
from megatron_vita.inference.settings import EngineSettings
from tests.inference.tiny import SPEC, save_checkpoint, write_media
from tests.scripts import ROOT, load_script

SETTINGS = EvalSettings(max_new_tokens=4)
TOOL = load_script("tools/evaluate.py")


def write_questions(path: Path, answers: list[str]) -> None:
    """Text, a picture, tiles and a video in turn, with these reference answers."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("Which digit?", {}),
        ("<image>\nWhich digit?", {"images": ["square.png"]}),
        ("<image>\nAnd this?", {"images": ["wide.jpg"]}),
        ("<video>\nWhich three?", {"videos": ["video.mp4"], "frames": 5, "depth": 0.25}),
    ]
    lines = []
    for number, answer in enumerate(answers):
        text, more = kinds[number % len(kinds)]
        talk = [{"role": "user", "content": f"{text} {number}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk} | more))
    path.write_text("\n".join(lines) + "\n")


def by_line(folder: Path) -> list[dict[str, Any]]:
    return sorted(read(folder), key=lambda one: one["line"])


def read(folder: Path) -> list[dict[str, Any]]:
    """The results, but for the time that they took."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "prefill_seconds"} for line in lines]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, media, and questions of which the model knows six of eight answers."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_checkpoint(folder)
    write_media(folder)
    write_questions(folder / "eval_mixed.jsonl", ["?"] * 8)
    engine = Engine.load(folder / "tiny")
    samples = [question.sample for question in read_questions(folder / "eval_mixed.jsonl")]
    known = [answer.text or "-" for answer in engine.generate(samples, max_new_tokens=4)]
    write_questions(folder / "eval_mixed.jsonl", [*known[:6], "wrong", "wrong"])
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Every sample an engine of this process is asked."""
    seen: list[Sample] = []
    plain = Preparation.__call__

    def prepare(self: Preparation, request: Request) -> Any:
        seen.append(request.sample)
        return plain(self, request)

    monkeypatch.setattr(Preparation, "__call__", prepare)
    return seen


def run(here: Path, output: Path, **more: Any) -> list[dict[str, Any]]:
    return evaluate([str(here / "tiny")], [str(here / "eval_mixed.jsonl")], output, SETTINGS, **more)


def test_counts_and_carried_fields(here: Path, tmp_path: Path) -> None:
    (row,) = run(here, tmp_path)
    assert (row["name"], row["count"], row["right"], row["unreadable"]) == ("tiny", 8, 6, 0)
    results = by_line(tmp_path)
    assert [one["line"] for one in results] == list(range(1, 9))
    assert results[3]["fields"] == {"frames": 5, "depth": 0.25}
    assert [one["verdict"] for one in results] == ["right"] * 6 + ["wrong"] * 2
    assert json.loads((tmp_path / "summary.json").read_text()) == [row]


def test_questions_have_the_ids_and_pixels_of_packed_shards(here: Path, tmp_path: Path) -> None:
    """The same file, once compiled for training and once asked: nothing may differ."""
    data = here / "eval_mixed.jsonl"
    mix = {"dataset": {"mixed": {"ratio": 1, "num": 999, "data_paths": [str(data)], "media_root": str(here)}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    preprocess.run(
        preprocess.Options(
            data_config=str(tmp_path / "mix.yaml"), tokenizer=str(here / "tokenizer"), output=str(tmp_path / "set"),
            seq_length=256, spec=SPEC, progress=False,
        )
    )  # fmt: skip
    shards = ShardSet(tmp_path / "set")
    engine = Engine.load(here / "tiny")
    questions = {question.line: question for question in read_questions(data)}
    seen = 0
    for pack in range(shards.num_packs):
        tokens, labels, start = shards.tokens(pack), shards.labels(pack), 0
        tile_ids = np.array(shards.pack_tiles(pack), dtype=np.int64)
        places = shards.tiles(tile_ids)["first_token"]
        for sample, length in zip(shards.pack_samples(pack), shards.sample_lengths(pack).tolist(), strict=True):
            asked = questions[int(shards.samples[sample]["line"])].sample
            example, media = engine.prepare(Request("1", asked, GREEDY))
            count = len(example.tokens)
            np.testing.assert_array_equal(tokens[start : start + count], example.tokens)
            assert (labels[start : start + count - 1] == -100).all()
            assert labels[start + count - 1] == tokens[start + count], "right behind the prompt the answer begins"
            mine = tile_ids[(places >= start) & (places < start + length)]
            assert [slot.first_token + start for slot in example.tiles] == places[mine - tile_ids[:1]].tolist()
            assert torch.equal(read_tiles(shards, mine)[0], media.tiles(0, len(example.tiles)))
            start, seen = start + length, seen + 1
    assert seen == 8


@pytest.mark.slow
def test_a_rerun_asks_only_what_is_missing(here: Path, tmp_path: Path, asked: list[Sample]) -> None:
    run(here, tmp_path, limit=3)
    assert len(asked) == 3
    with (tmp_path / "results.jsonl").open("a") as torn:
        torn.write('{"run": "ab')
    (row,) = run(here, tmp_path)
    assert len(asked) == 8
    assert row["right"] == 6
    run(here, tmp_path)
    assert len(asked) == 8, "nothing was left to ask"
    fresh = tmp_path / "fresh"
    run(here, fresh)
    assert by_line(fresh) == by_line(tmp_path)


@pytest.mark.slow
def test_a_kill_keeps_what_was_answered(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = EvalSettings(max_new_tokens=4, engine=EngineSettings(max_num_seqs=1))
    whole = tmp_path / "whole"
    evaluate([str(here / "tiny")], [str(here / "eval_mixed.jsonl")], whole, one)
    plain, answers = ResultFile.add, 0

    def killed(self: ResultFile, result: dict[str, Any]) -> None:
        nonlocal answers
        plain(self, result)
        answers += 1
        if answers == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate([str(here / "tiny")], [str(here / "eval_mixed.jsonl")], tmp_path, one)
    assert len(read(tmp_path)) == 3
    monkeypatch.setattr(ResultFile, "add", plain)
    evaluate([str(here / "tiny")], [str(here / "eval_mixed.jsonl")], tmp_path, one)
    assert read(tmp_path) == read(whole)


@pytest.mark.slow
def test_two_processes_answer_as_one(here: Path, tmp_path: Path) -> None:
    run(here, tmp_path / "one")
    with pytest.raises(ConfigError, match="before any model"):
        run(here, tmp_path / "two", workers=2)
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), "--model", str(here / "tiny"), "--workers", "2"]
    command += ["--data", str(here / "eval_mixed.jsonl"), "--output", str(tmp_path / "two"), "--max-new-tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "75.0%" in done.stdout
    assert by_line(tmp_path / "two") == by_line(tmp_path / "one")


def test_a_failing_process_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: False)  # the work below starts no world

    def work(rank: int, problem: str) -> Iterator[dict[str, Any]]:
        yield {"rank": rank}
        if rank == 1 and problem == "damaged":
            raise CheckpointError("damaged")
        if rank == 1 and problem == "bug":
            raise RuntimeError("a bug")
        if rank == 1 and problem == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    for problem, kind, says in (
        ("damaged", CheckpointError, "damaged"),
        ("bug", VitaError, "process 1 failed:.*a bug"),
        ("killed", VitaError, "process 1 died"),
    ):
        seen: list[int] = []
        with pytest.raises(kind, match=f"(?s){says}"):
            seen.extend(one["rank"] for one in processes.in_processes(2, partial(work, problem=problem)))
        assert 1 in seen, "what came before the failure is kept"
    assert sorted(one["rank"] for one in processes.in_processes(3, partial(work, problem=""))) == [0, 1, 2]


@pytest.mark.slow
def test_settings_and_weights_decide_what_counts_as_answered(here: Path, tmp_path: Path, asked: list[Sample]) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    root = save_checkpoint(copy)
    data, output = [str(here / "eval_mixed.jsonl")], tmp_path / "out"
    evaluate([str(root)], data, output, SETTINGS)
    evaluate([str(root)], data, output, EvalSettings(max_new_tokens=4, engine=EngineSettings(block_size=8)))
    assert len(asked) == 8, "the size of a block decides no answer"
    (row,) = evaluate([str(root)], data, output, EvalSettings(max_new_tokens=4, zero_tiles=True))
    assert len(asked) == 16
    assert row["zero_tiles"]
    assert len(read(output)) == 16, "seen and blind answers stand side by side"
    evaluate([str(root)], data, output, EvalSettings(max_new_tokens=4, engine=EngineSettings(dtype="bfloat16")))
    assert len(asked) == 24, "another dtype does"
    shutil.rmtree(root)
    save_checkpoint(copy, seed=5)
    evaluate([str(root)], data, output, SETTINGS)
    assert len(asked) == 32, "another model at the same path is asked anew"
    assert len(read(output)) == 16


@pytest.mark.slow
def test_models_of_one_name_are_told_apart(here: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = save_checkpoint(other, seed=9)
    rows = evaluate([str(here / "tiny"), str(second)], [str(here / "eval_mixed.jsonl")], tmp_path, SETTINGS, limit=2)
    assert [row["name"] for row in rows] == [str(here / "tiny"), str(second)]


def test_a_damaged_picture_counts_as_wrong_and_is_told(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wide.jpg", "video.mp4"):
        shutil.copy(here / name, tmp_path / name)
    (tmp_path / "square.png").write_bytes(b"broken")
    shutil.copy(here / "eval_mixed.jsonl", tmp_path / "eval_mixed.jsonl")
    command = ["--model", str(here / "tiny"), "--data", str(tmp_path / "eval_mixed.jsonl")]
    status = TOOL.main([*command, "--output", str(tmp_path / "out"), "--max-new-tokens", "4"])
    assert status == 1
    said = capsys.readouterr()
    assert "8 (2 unreadable)" in said.out
    assert "2 questions could not be read" in said.err
    assert said.err.count("counts as wrong: ") == 1, "the first of a set says why"
    assert re.search("question [26], counts as wrong: media_broken: .*square.png", said.err)
    assert [one["line"] for one in by_line(tmp_path / "out") if one["verdict"] == "unreadable"] == [2, 6]


def test_command_line(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = TOOL.main
    command = ["--model", str(here / "tiny"), "--data", str(here / "eval_mixed.jsonl"), "--output", str(tmp_path / "o")]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "75.0%" in said
    assert said.splitlines()[-1].startswith("wrote ")
    assert main([*command, "--task", "guess"]) == 2
    assert main([*command[2:], "--model", str(tmp_path / "none")]) == 2
    assert main([*command, "--data", str(tmp_path / "none.jsonl")]) == 2
    (tmp_path / "empty").mkdir()
    assert main([*command[2:], "--model", str(tmp_path / "empty")]) == 2
    assert "neither a finished checkpoint nor a Hugging Face folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([*command, "--workers", "0"])
    assert usage.value.code == 2


def test_wrong_settings_are_refused(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact_match"):
        EvalSettings(task="guess")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        EvalSettings(max_new_tokens=0)
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not an evaluation result"):
        run(here, tmp_path)


def test_two_evaluations_do_not_write_one_results_file(tmp_path: Path) -> None:
    """Else each question has two answers, and the earlier process writes on in a file that the other has replaced."""
    hold = "import sys; from pathlib import Path; from megatron_vita.evaluation.results import ResultFile\n"
    hold += "kept = ResultFile(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "results.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another evaluation is writing there"):
            ResultFile(tmp_path / "results.jsonl")
        other.kill()
    ResultFile(tmp_path / "results.jsonl").close()


def test_a_results_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "results.jsonl"
    notes.write_text("my notes without a line break")
    with pytest.raises(DataError, match="no evaluation result"):
        ResultFile(notes)
    assert notes.read_text() == "my notes without a line break"
    with pytest.raises(ConfigError, match="Check --output"):
        ResultFile(notes / "results.jsonl")
