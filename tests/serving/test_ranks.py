"""The server on two ranks, as torchrun starts them: answers of both, and a dead rank that ends it with a message."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.inference.tiny import save_checkpoint
from tests.ranks import run_ranks
from tests.scripts import ROOT


@contextmanager
def two_ranks(model: Path) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """`tools/serve.py` on two context-parallel ranks; its address once it is ready, and its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "tools/serve.py", "--model", str(model), "--port", "0", "--context-parallel-size", "2"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        address = ""
        assert ranks[0].stderr is not None
        for line in ranks[0].stderr:
            address = address or "".join(re.findall(r"http://\S+:\d+", line))
            if "and ready" in line:
                break
        yield address, ranks
    finally:
        for one in ranks:
            one.kill()
            one.wait()


@pytest.mark.slow
def test_a_dead_rank_ends_the_answer_and_the_server(tmp_path: Path) -> None:
    run_ranks(1, save_checkpoint, tmp_path)
    with two_ranks(tmp_path / "tiny") as (address, ranks), httpx.Client(base_url=address, timeout=60) as client:
        ask = {"messages": [{"role": "user", "content": "the"}], "temperature": 0, "max_tokens": 4, "ignore_eos": True}
        whole = client.post("/v1/chat/completions", json=ask).json()
        assert whole["usage"]["completion_tokens"] == 4
        endless = ask | {"max_tokens": 100_000, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=endless) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
            assert all("error" not in one for one in first)
            ranks[1].send_signal(signal.SIGKILL)
            *_, error, done = list(lines)
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["status"] == 503
        assert ranks[0].wait(60) == 1
        assert ranks[0].stderr is not None
        assert "another rank was lost" in ranks[0].stderr.read()
