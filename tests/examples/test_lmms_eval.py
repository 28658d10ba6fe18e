"""The questions of examples/evaluate/lmms_eval.sh, and lmms-eval asking them where it is installed."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples/evaluate/digits"


def lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / "digits.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(png: str) -> bytes:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).tobytes()


def test_the_questions_are_those_of_the_quickstart() -> None:
    made = list(load_script("examples/evaluate/make_digits.py").questions())
    assert [(one["question"], one["answer"]) for one in lines()] == [(one["question"], one["answer"]) for one in made]
    assert [pixels(one["image"]) for one in lines()] == [pixels(one["image"]) for one in made]
    assert Counter(one["answer"] for one in lines()) == {str(digit): 2 for digit in range(10)}


def test_the_task_shows_asks_and_scores() -> None:
    task, line = load_script("examples/evaluate/digits/utils.py"), lines()[0]
    (picture,) = task.doc_to_visual(line)
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert task.doc_to_text(line) == "Which digit is this?"
    assert task.process_results(line, [f" {line['answer']}\n"]) == {"exact_match": 1.0}
    assert (
        task.process_results(line, [""]) == task.process_results(line, [f"{line['answer']}0"]) == {"exact_match": 0.0}
    )


def test_the_script_says_how_it_is_called() -> None:
    ran = subprocess.run(["bash", ROOT / "examples/evaluate/lmms_eval.sh"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "lmms_eval.sh .venv-lmms http://" in ran.stderr


class Answers(BaseHTTPRequestHandler):
    """A server whose answer to everything is 7; keeps the bodies it has read."""

    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        message = {"role": "assistant", "content": "7"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "a", "object": "chat.completion", "created": 1, "model": "any", "choices": [choice]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing: the test prints what matters."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address and the bodies that arrive there."""
    bodies: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"bodies": bodies})) as here:
        thread = threading.Thread(target=here.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{here.server_port}/v1", bodies
        here.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif("LMMS_EVAL_VENV" not in os.environ, reason="LMMS_EVAL_VENV names no environment with lmms-eval")
def test_lmms_eval_asks_and_scores(server: tuple[str, list[dict[str, Any]]]) -> None:
    """Two of twenty digits are a 7; every body is one of the two forms that the client tests ask."""
    address, bodies = server
    script = [str(ROOT / "examples/evaluate/lmms_eval.sh"), os.environ["LMMS_EVAL_VENV"], address]
    ran = subprocess.run(
        script, capture_output=True, text=True, check=False, env={**os.environ, "PYTHON": sys.executable}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    row = next(line for line in ran.stdout.splitlines() if line.startswith("|digits"))
    assert [cell.strip() for cell in row.split("|")][4:7] == ["exact_match", "↑", "0.1"], row
    assert len(bodies) == 20
    for body in bodies:
        assert body.keys() == {"model", "messages", "max_tokens", "temperature"}
        (message,) = body["messages"]
        picture, text = message["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        assert text == {"type": "text", "text": "Which digit is this?"}
