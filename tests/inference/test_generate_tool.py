"""tools/generate.py from end to end: a batch file, a model, answers."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.data.sample import Message, Sample, Text
from megatron_vita.inference.batch_file import BatchRun
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.sampling_config import SamplingConfig
from tests.data.kit import picture
from tests.inference.tiny import question, save_checkpoint, write_media
from tests.scripts import ROOT, load_script

GENERATE = load_script("tools/generate.py")


def request(custom_id: str, *parts: Any, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": list(parts)}], "temperature": 0, "max_tokens": 6, **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def look(url: str, kind: str = "image_url") -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, media, and requests of every kind."""
    folder = tmp_path_factory.mktemp("generate")
    save_checkpoint(folder)
    write_media(folder)
    uri = "data:image/png;base64," + base64.b64encode(picture(16, 16, seed=1)).decode()
    frames = [picture(32, 32, seed=seed, kind="JPEG") for seed in range(3)]
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames):
        (folder / f"frames/{number}.jpg").write_bytes(frame)
    inline = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    lines = [
        request("frames", look("frames", "video_url"), say("Which three?")),
        request("inline", look(inline, "video_url"), say("Which three?")),
        request("text", say("Which digit?")),
        request("picture", look("wide.jpg"), say("What?")),
        request("data", look(uri), say("What?")),
        request("file", look("square.png"), say("What?")),
        request("video", look("video.mp4", "video_url"), say("Which three?")),
        request("hot", say("the"), temperature=2, n=2, seed=3),
        request("probable", say("the"), logprobs=True, top_logprobs=3, prompt_logprobs=0),
        request("long", say("word " * 600)),
        request("bad", say("the"), best_of=2),
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def plain(text: str) -> Sample:
    return Sample((Message("user", (Text(text),)),), source="test", line=1)


def command(here: Path, output: Path, *words: str) -> list[str]:
    return ["--model", str(here / "tiny"), "--input", str(here / "requests.jsonl"), "--output", str(output), *words]


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


def texts(path: Path) -> dict[str, list[str]]:
    return {
        name: [choice["message"]["content"] for choice in line["response"]["body"]["choices"]]
        for name, line in read(path).items()
        if line["error"] is None
    }


@pytest.fixture(scope="module")
def answered(here: Path) -> Path:
    """Answers of one rank."""
    assert GENERATE.main(command(here, here / "answers.jsonl")) == 1, "two requests cannot be answered"
    return here / "answers.jsonl"


def test_answers_are_the_engines(here: Path, answered: Path) -> None:
    engine = Engine.load(here / "tiny")
    asked = {
        "text": plain("Which digit?"),
        "picture": question("What?", images=[here / "wide.jpg"]),
        "data": question("What?", images=[here / "square.png"]),
        "file": question("What?", images=[here / "square.png"]),
        "video": question("Which three?", videos=[here / "video.mp4"]),
        "frames": question("Which three?", videos=[here / "frames"]),
        "inline": question("Which three?", videos=[here / "frames"]),
    }
    expected = engine.generate(list(asked.values()), max_new_tokens=6)
    got = texts(answered)
    assert {name: got[name] for name in asked} == {name: [one.text] for name, one in zip(asked, expected, strict=True)}
    for choice, text in enumerate(got["hot"]):
        hot = SamplingConfig(temperature=2, seed=3 + choice)
        assert engine.generate([plain("the")], max_new_tokens=6, sampling=hot)[0].text == text
    body = read(answered)["text"]["response"]["body"]
    assert body["usage"]["prompt_tokens"] == expected[0].prompt_tokens > 0
    assert body["usage"]["completion_tokens"] == len(expected[0].ids)
    assert body["model"] == "tiny"


def test_log_probabilities_are_listed(answered: Path) -> None:
    body = read(answered)["probable"]["response"]["body"]
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    for one in content:
        assert one["logprob"] == max(top["logprob"] for top in one["top_logprobs"]), "greedy takes the likeliest"
        assert len(one["top_logprobs"]) == 3
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert all(len(one) == 1 for one in body["prompt_logprobs"][1:])


def test_what_cannot_be_answered_says_why(answered: Path) -> None:
    got = read(answered)
    assert len(got) == 11
    assert {name: line["error"]["code"] for name, line in got.items() if line["error"]} == {
        "long": "context_length_exceeded", "bad": "unknown_parameter"
    }  # fmt: skip
    assert "512" in got["long"]["error"]["message"], "the model's positions"


def test_a_second_run_asks_what_failed_alone(
    here: Path, answered: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(answered)
    seen: list[str] = []
    plain = BatchRun._read

    def watch(self: BatchRun, custom_id: str, body: Any, number: int) -> Any:
        seen.append(custom_id)
        return plain(self, custom_id, body, number)

    monkeypatch.setattr(BatchRun, "_read", watch)
    assert GENERATE.main(command(here, answered)) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"wrote {answered}: 0 answered, 9 kept, 2 failed"
    assert "2 requests failed" in said.err
    assert texts(answered) == before
    assert seen[9:] == ["long", "bad"]


def test_where_all_is_answered_no_model_is_loaded(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requests.jsonl").write_text(json.dumps(request("a", say("the"))) + "\n")
    words = [
        "--model",
        str(here / "tiny"),
        "--input",
        str(tmp_path / "requests.jsonl"),
        "--output",
        str(tmp_path / "a"),
    ]
    assert GENERATE.main(words) == 0
    monkeypatch.setattr(Engine, "load", None)
    assert GENERATE.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 answered, 1 kept, 0 failed")
    assert GENERATE.main([*words, "--context-parallel-size", "1", "--block-size", "8"]) == 0, "decides no answer"
    with pytest.raises(TypeError):
        GENERATE.main([*words, "--dtype", "bfloat16"])


def test_clear_errors(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(says: str, *words: str) -> None:
        assert GENERATE.main([*command(here, tmp_path / "a.jsonl"), *words]) == 2
        said = capsys.readouterr()
        assert says in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""

    fails("no such folder", "--model", str(tmp_path / "none"))
    fails("Check --input", "--input", str(tmp_path / "none"))
    fails("Check --media-root", "--media-root", str(tmp_path / "none"))
    fails("block_size=0", "--block-size", "0")
    fails("kv_cache_memory='lots'", "--kv-cache-memory", "lots")
    fails("torchrun", "--context-parallel-size", "2")
    with pytest.raises(SystemExit) as usage:
        GENERATE.main(["--model", "m"])
    assert usage.value.code == 2


def test_a_text_model_refuses_a_picture_alone(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = save_checkpoint(tmp_path, vision=False, name="text")
    assert GENERATE.main(command(here, tmp_path / "a.jsonl", "--model", str(root))) == 1
    assert "3 answered, 0 kept, 8 failed" in capsys.readouterr().out
    assert "text-only" in read(tmp_path / "a.jsonl")["picture"]["error"]["message"]


@pytest.mark.slow
def test_it_runs_under_torchrun(here: Path, answered: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [
        *start,
        str(ROOT / "tools/generate.py"),
        *command(here, tmp_path / "a.jsonl", "--context-parallel-size", "2"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("wrote ")] == [
        f"wrote {tmp_path / 'a.jsonl'}: 9 answered, 0 kept, 2 failed"
    ]
    assert texts(tmp_path / "a.jsonl") == texts(answered)


_KILLED = """
import os, signal, sys
from megatron_vita.inference.answer_file import AnswerFile
from tests.scripts import load_script
plain, left = AnswerFile.add, [3]
def add(self, *line):
    plain(self, *line)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerFile.add = add
load_script("tools/generate.py").main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(here: Path, answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.jsonl"
    words = [sys.executable, "-c", _KILLED, *command(here, output)]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode == -signal.SIGKILL
    kept = len(texts(output))
    assert len(read(output)) == 3
    assert GENERATE.main(command(here, output)) == 1
    assert f"{9 - kept} answered, {kept} kept" in capsys.readouterr().out
    assert texts(output) == texts(answered)
