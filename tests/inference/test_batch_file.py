"""Batches in OpenAI's file format: every line gets its line, and a run goes on where it stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.answer_file import AnswerFile
from megatron_vita.inference.batch_file import BatchRun, BatchSummary
from megatron_vita.inference.prompt import Request
from tests.data.kit import picture
from tests.inference.fake_engine import FakeEngine, text_of


def spell(token: int) -> bytes:
    return chr(token).encode()


def request(custom_id: Any, content: Any = "Why?", **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def look(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]


def write(folder: Path, lines: list[Any]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def batch(folder: Path, *, identity: str = "model", **more: Any) -> BatchRun:
    where = {"model": "tiny", "identity": lambda: identity, "media_root": None, "vocab_size": 999, **more}
    return BatchRun(folder / "requests.jsonl", folder / "answers.jsonl", **where)


def run(folder: Path, engine: FakeEngine | None = None, **more: Any) -> BatchSummary:
    with batch(folder, **more) as one:
        return one.answer(engine or FakeEngine(), spell, progress=False)


def answers(folder: Path) -> dict[str | None, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return {line["custom_id"]: line for line in lines}


def said(line: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in line["response"]["body"]["choices"]]


def test_each_request_gets_its_answer(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(4, 4, seed=1))
    write(
        tmp_path,
        [request("a", "Why?", seed=5, model="mine", max_tokens=2), "", request("é/-1", look("a.png"), n=2, seed=7)],
    )
    assert run(tmp_path) == BatchSummary(kept=0, answered=2, failed=0)
    got = answers(tmp_path)
    assert set(got) == {"a", "é/-1"}
    assert said(got["a"]) == ["Why? #5"]
    assert sorted(said(got["é/-1"])) == ["\nWhat? #7", "\nWhat? #8"]
    line = got["a"]
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["error"] is None
    assert line["id"].startswith("batch_req_")
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"]
    assert line["response"]["body"]["model"] == "mine"
    assert line["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert got["é/-1"]["response"]["body"]["model"] == "tiny"
    assert [one["index"] for one in got["é/-1"]["response"]["body"]["choices"]] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "answers.jsonl", "requests.jsonl"]


def test_a_bad_line_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("no picture")
    header = b"IHDR" + (10**5).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    png = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
    bomb = base64.b64encode(png).decode()
    bad = {
        "url": (request("url") | {"url": "/v1/embeddings"}, "url", "invalid_line"),
        "method": (request("method") | {"method": "GET"}, "method", "invalid_line"),
        "more": (request("more") | {"x": 1}, "x", "invalid_line"),
        "body": (request("body") | {"body": 3}, "body", "invalid_type"),
        "nobody": ({k: v for k, v in request("nobody").items() if k != "body"}, "body", "invalid_type"),
        "field": (request("field", best_of=3), "best_of", "unknown_parameter"),
        "stream": (request("stream", stream=True), "stream", "invalid_value"),
        "gone": (request("gone", look("gone.png")), "messages[0].content[0].image_url.url", "media_missing"),
        "root": (request("root", look("../x.png")), "messages[0].content[0].image_url.url", "path_escape"),
        "fake": (request("fake", look("fake.png")), None, "media_broken"),
        "bomb": (
            request("bomb", look("data:image/png;base64," + bomb)),
            "messages[0].content[0].image_url.url",
            "media_bomb",
        ),
    }
    good = [request(f"good{number}", str(number)) for number in range(3)]
    write(tmp_path, [good[0], *(line for line, _, _ in bad.values()), good[1], good[2]])
    assert run(tmp_path) == BatchSummary(kept=0, answered=3, failed=len(bad))
    got = answers(tmp_path)
    assert set(got) == {*bad, "good0", "good1", "good2"}
    for name, (_, param, code) in bad.items():
        line = got[name]
        assert (line["error"]["param"], line["error"]["code"]) == (param, code), name
        assert line["error"]["type"] == "invalid_request_error"
        assert line["response"]["status_code"] == 400
        assert line["response"]["body"] == {"error": line["error"]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"), ("[]", "line 2: not a JSON object"), ('"x"', "not a JSON object"),
        ('{"custom_id": NaN}', "NaN is no JSON"), ("[" * 100_000, "not JSON"), ("\ufffe", "not JSON"),
        (request(None), "custom_id must be a string, not null"), (request(3), "must be a string, not a number"),
        (request(""), "custom_id is empty"), (request("\ud800"), "half a character"),
        (request("a"), "custom_id 'a' stands on line 1 already"),
    ],
)  # fmt: skip
def test_a_line_without_a_name_of_its_own_is_answered_under_null(tmp_path: Path, line: Any, says: str) -> None:
    write(tmp_path, [request("a"), line, request("b")])
    assert run(tmp_path) == BatchSummary(kept=0, answered=2, failed=1)
    got = answers(tmp_path)
    assert set(got) == {"a", "b", None}
    assert says in got[None]["error"]["message"]


def test_bytes_that_are_no_text_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(request("a")).encode())
    assert run(tmp_path) == BatchSummary(kept=0, answered=1, failed=1)


def test_a_failed_choice_fails_its_request_once(tmp_path: Path) -> None:
    def answer(one: Request) -> str:
        if one.sampling.seed == 6:
            raise DataError("overlong: too long")
        return "fine"

    write(tmp_path, [request("a", n=3, seed=5), request("b", seed=1)])
    assert run(tmp_path, FakeEngine(most=4, answer=answer)) == BatchSummary(kept=0, answered=1, failed=1)
    assert answers(tmp_path)["a"]["error"]["code"] == "context_length_exceeded"
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_requests_are_pulled_as_there_is_room(tmp_path: Path) -> None:
    """A batch of any size is neither held nor read ahead."""
    write(tmp_path, [request(str(number)) for number in range(50)])
    engine = FakeEngine(most=3)
    with batch(tmp_path) as one:
        lines = one._lines()
        read = []
        one._lines = lambda: (read.append(line[0]) or line for line in lines)  # type: ignore[method-assign,func-returns-value]
        seen = []

        def answer(request: Request) -> str:
            seen.append(len(read) - len(seen))
            return "x"

        engine._answer = answer
        one.answer(engine, spell, progress=False)
    assert len(seen) == 50
    assert max(seen) <= 3


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    write(tmp_path, [request(str(number), f"Q{number}") for number in range(8)])

    def killed(one: Request) -> str:
        if one.id == "5-0":
            raise KeyboardInterrupt
        return text_of(one)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeEngine(most=1, answer=killed))
    path = tmp_path / "answers.jsonl"
    before = path.read_bytes()
    assert len(before.splitlines()) == 5, "each answer is on disk at once"
    path.write_bytes(before + before.splitlines()[0][:100])  # torn
    engine = FakeEngine(answer=text_of)
    assert run(tmp_path, engine) == BatchSummary(kept=5, answered=3, failed=0)
    assert {one.id for one in engine.asked} == {"5-0", "6-0", "7-0"}
    assert path.read_bytes().startswith(before), "nothing was rewritten"
    assert {name: said(line) for name, line in answers(tmp_path).items()} == {str(n): [f"Q{n}"] for n in range(8)}
    engine = FakeEngine()
    assert run(tmp_path, engine) == BatchSummary(kept=8, answered=0, failed=0)
    assert not engine.asked


def test_what_decides_an_answer_makes_it_asked_again(tmp_path: Path) -> None:
    picture_file = tmp_path / "a.png"
    picture_file.write_bytes(picture(4, 4, seed=1))
    lines = [request("text"), request("look", look("a.png")), request("other", "Who?")]
    write(tmp_path, lines)
    run(tmp_path)

    def asked(**more: Any) -> set[str]:
        engine = FakeEngine()
        assert run(tmp_path, engine, **more).kept == 3 - len(engine.asked)
        assert set(answers(tmp_path)) >= {"text", "look", "other"}
        assert len(answers(tmp_path)) == len((tmp_path / "answers.jsonl").read_text().splitlines())
        return {one.id for one in engine.asked}

    assert asked() == set()
    picture_file.write_bytes(picture(4, 4, seed=2))
    assert asked() == {"look-0"}
    write(tmp_path, [request("text", temperature=0.5), *lines[1:]])
    assert asked() == {"text-0"}
    assert asked(identity="another") == {"text-0", "look-0", "other-0"}
    write(tmp_path, list(reversed(lines)))
    assert asked(identity="another") == {"text-0"}, "the order is nothing that decides"
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert asked(identity="another", media_root=tmp_path / "elsewhere") == set(), "nor where the media lie"


def test_failures_are_tried_again(tmp_path: Path) -> None:
    write(tmp_path, [request("a", look("a.png")), request("b"), "{"])
    assert run(tmp_path) == BatchSummary(kept=0, answered=1, failed=2)
    (tmp_path / "a.png").write_bytes(picture(4, 4, seed=1))
    assert run(tmp_path) == BatchSummary(kept=1, answered=1, failed=1)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert answers(tmp_path)["a"]["error"] is None


def test_answers_to_requests_that_are_gone_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [request("a"), request("b")])
    run(tmp_path)
    write(tmp_path, [request("b"), request("c")])
    assert run(tmp_path) == BatchSummary(kept=1, answered=1, failed=0)
    assert set(answers(tmp_path)) == {"a", "b", "c"}
    assert "1 answers to requests that are not in the input" in caplog.text


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [request("a")])
    with batch(tmp_path), pytest.raises(ConfigError, match="another run is writing it"):
        batch(tmp_path).__enter__()
    assert run(tmp_path).answered == 1, "the first let go"


def test_what_cannot_work_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"requests.jsonl: no such file. Check --input"):
        batch(tmp_path)
    path = write(tmp_path, [request("a")])
    with pytest.raises(ConfigError, match="Check --media-root"):
        batch(tmp_path, media_root=tmp_path / "none")
    with pytest.raises(ConfigError, match="these are the requests"):
        BatchRun(path, path, model="m", identity=str, media_root=None, vocab_size=9)
    (tmp_path / "answers.jsonl").write_text('{"results": 3}\n')
    with pytest.raises(DataError, match=r"answers.jsonl, line 1: not a line of answers"):
        batch(tmp_path).__enter__()
    assert (tmp_path / "answers.jsonl").read_text() == '{"results": 3}\n'
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        AnswerFile(tmp_path / "file" / "answers.jsonl").__enter__()
    assert not (tmp_path / "answers.jsonl.lock").exists()


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with AnswerFile(tmp_path / "answers.jsonl") as output, full.open("wb", buffering=0) as stream:
        output._file = stream
        with pytest.raises(DataError, match=r"No space left on device. Run again to continue"):
            output.add("a", "0", {}, None)


def killed_after(count: int) -> Callable[[Request], str]:
    left = [count]

    def answer(one: Request) -> str:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return text_of(one)

    return answer


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["good", "bad", "named", "gone"]), max_size=8),
    stops=st.lists(st.integers(0, 8), max_size=3),
    torn=st.integers(0, 200),
)
def test_however_often_it_is_killed_every_line_has_one_line(
    tmp_path: Path, kinds: list[str], stops: list[int], torn: int
) -> None:
    made = {
        "good": lambda number: request(str(number), f"Q{number}", n=1 + number % 2),
        "bad": lambda number: "{",
        "named": lambda number: request(str(number), best_of=2),
        "gone": lambda number: request(str(number), look("gone.png")),
    }
    write(tmp_path, [made[kind](number) for number, kind in enumerate(kinds)])
    path = tmp_path / "answers.jsonl"
    path.unlink(missing_ok=True)
    for stop in stops:
        engine = FakeEngine(answer=killed_after(stop))
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path, engine)
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - torn)])
    summary = run(tmp_path, FakeEngine(answer=text_of))
    good = [str(number) for number, kind in enumerate(kinds) if kind == "good"]
    assert summary.kept + summary.answered == len(good)
    assert summary.failed == len(kinds) - len(good)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(kinds)
    assert sorted(line["custom_id"] for line in lines if line["error"] is None) == sorted(good)


@pytest.mark.parametrize("content", ["my notes without a line break", '{"a": 1}', '{"id": "x"}'])
def test_a_file_that_is_no_answers_is_left_alone(tmp_path: Path, content: str) -> None:
    other = tmp_path / "notes.txt"
    other.write_text(content)
    with pytest.raises(DataError, match="line 1: not a line of answers"):
        AnswerFile(other).__enter__()
    assert other.read_text() == content
