"""Tools on several ranks: rank 0 reads, writes and speaks, and the answers are those of one rank."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.leader import from_leader, leads
from tests.inference.tiny import save_checkpoint, write_media
from tests.ranks import run_ranks
from tests.scripts import load_script

GENERATE = load_script("tools/generate.py")
CHAT = load_script("tools/chat.py")
EVALUATE = load_script("tools/evaluate.py")
LAYOUTS = {
    "cp2": ["--context-parallel-size", "2"],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "tp2cp2": ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"],
}


def write_requests(folder: Path) -> None:
    look = [{"type": "image_url", "image_url": {"url": "wide.jpg"}}, {"type": "text", "text": "What?"}]
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Which digit?"}], "temperature": 0},
        {"messages": [{"role": "user", "content": look}], "temperature": 0, "logprobs": True},
        {"messages": [{"role": "user", "content": "the"}], "temperature": 2, "n": 2},
        {"messages": [{"role": "user", "content": "the"}], "best_of": 2},
    ]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body | {"max_tokens": 5}}
        for number, body in enumerate(bodies)
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "7"}]
    (folder / "q.jsonl").write_text(json.dumps({"messages": talk, "images": ["wide.jpg"]}) + "\n")


def texts(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        line["custom_id"]: line["error"]["code"]
        if line["error"]
        else [choice["message"]["content"] for choice in line["response"]["body"]["choices"]]
        for line in lines
    }


def results(folder: Path) -> list[dict[str, Any]]:
    """Lines of an evaluation, but for the time that they took."""
    lines = [json.loads(line) for line in (folder / "results/results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "prefill_seconds"} for line in lines]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_media(folder)
    write_requests(folder)
    run_ranks(1, save_checkpoint, folder)
    run_ranks(1, all_tools, folder, "one", [])
    return folder


def all_tools(folder: Path, name: str, flags: list[str]) -> None:
    """Each tool twice, as torchrun starts it."""
    model = ["--model", str(folder / "tiny"), *flags]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        batch = [*model, "--input", str(folder / "requests.jsonl"), "--output", str(folder / name / "answers.jsonl")]
        assert GENERATE.main(batch) == (1 if leads() else 0), "one request is bad"
        lines = (folder / "requests.jsonl").read_text().splitlines(keepends=True)
        if leads():
            (folder / name / "good.jsonl").write_text("".join(lines[:-1]))
        assert CHAT.main([*model, "--max-new-tokens", "5", "Which digit?"]) == 0
        questions = ["--data", str(folder / "q.jsonl"), "--output", str(folder / name / "results")]
        grid = ["--needle", "visual", "text", "--frames", "9", "--lengths", "60", "--depths", "1", "--samples", "1"]
        for _ in range(2):
            assert EVALUATE.main([*model, *questions, "--max-new-tokens", "5"]) == 0
        assert EVALUATE.main([*model, *questions[2:], *grid, "--max-new-tokens", "5"]) == 0
        batch[batch.index("--input") + 1] = str(folder / name / "good.jsonl")
        Engine.load = None  # type: ignore[assignment,method-assign]
        batch += ["--media-root", str(folder)]
        assert GENERATE.main(batch) == 0, "all is there already"
        assert GENERATE.main([*batch, "--media-root", "none"]) == 2, "every rank hears of it"
    (folder / f"{name}-{dist.get_rank()}.out").write_text(said.getvalue().replace(str(folder / name), "FOLDER"))


@pytest.mark.parametrize(
    "layout", ["cp2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tp2", "pp2", "tp2cp2"))]
)
def test_all_tools_answer_as_on_one_rank(here: Path, layout: str) -> None:
    ranks = 4 if layout == "tp2cp2" else 2
    run_ranks(ranks, all_tools, here, layout, LAYOUTS[layout])
    said = [(here / f"{layout}-{rank}.out").read_text() for rank in range(ranks)]
    assert said[0] == (here / "one-0.out").read_text()
    assert not any(said[1:]), "the others are silent"
    assert "wrote FOLDER/answers.jsonl: 3 answered, 0 kept, 1 failed" in said[0]
    assert "wrote FOLDER/answers.jsonl: 0 answered, 3 kept, 0 failed" in said[0]
    one, several = ((here / name / "answers.jsonl") for name in ("one", layout))
    assert texts(one) == texts(several)
    assert results(here / "one") == results(here / layout)


def _hear() -> None:
    assert from_leader(lambda: dist.get_rank() + 3) == 3
    with pytest.raises(DataError, match="rank 0 says so"):
        from_leader(lambda: _fail("rank 0 says so") if leads() else None)
    assert from_leader(lambda: "again") == "again"


def _fail(why: str) -> None:
    raise DataError(why)


def test_what_the_leader_finds_everybody_hears() -> None:
    run_ranks(2, _hear)
    assert from_leader(lambda: 3) == 3, "alone, without any world"
    with pytest.raises(ConfigError):
        from_leader(lambda: (_ for _ in ()).throw(ConfigError("x")))
