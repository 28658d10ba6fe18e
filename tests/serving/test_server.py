"""The server's own rules, over a fake engine: who is answered, who waits, who is given up, and how it ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from megatron_vita.errors import VitaError
from tests.serving.fakes import FakeEngine, serving


def body(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ") if line.endswith("[DONE]") else json.loads(line.removeprefix("data: "))


CHAT = "/v1/chat/completions"


def test_a_chat_is_answered_at_once_or_as_a_stream() -> None:
    with serving(FakeEngine()) as (address, _), httpx.Client(base_url=address) as client:
        whole = client.post(CHAT, json=body(model="theirs")).json()
        assert whole["choices"][0]["message"]["content"] == "one two three "
        assert whole["model"] == "theirs"
        assert whole["usage"]["completion_tokens"] == 3
        with client.stream("POST", CHAT, json=body(stream=True, stream_options={"include_usage": True})) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, done = events(response)
        assert done == "[DONE]"
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks[:-1]) == "one two three "
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        cut = client.post(CHAT, json=body(max_tokens=2)).json()
        assert cut["choices"][0]["finish_reason"] == "length"
        two = client.post(CHAT, json=body(n=2)).json()
        assert [one["index"] for one in two["choices"]] == [0, 1]


def test_models_health_metrics_and_errors_in_openais_form() -> None:
    with serving(FakeEngine()) as (address, _), httpx.Client(base_url=address) as client:
        model = client.get("/v1/models").json()["data"][0]
        assert model["id"] == "tiny"
        assert model["max_model_len"] == 1000
        assert client.get("/v1/models/tiny").json() == model
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert client.get("/info").json()["limits"]["pictures"]
        for method, path, status in (("GET", CHAT, 405), ("POST", "/nowhere", 404), ("GET", "/../etc/passwd", 404)):
            error = client.request(method, path)
            assert error.status_code == status
            assert error.json()["error"]["message"]
        no_question = client.post(CHAT, json={"messages": [{"role": "assistant", "content": "Hm."}]})
        assert not no_question.json()["error"]["message"].startswith("request")
        for content, kind, status in (
            (b"{", "application/json", 400), (b"[1]", "application/json", 400), (b"{}", "text/plain", 415),
            (b"\xff", "application/json", 400), (b"[" * 100_000, "application/json", 400),
        ):  # fmt: skip
            refused = client.post(CHAT, content=content, headers={"Content-Type": kind})
            assert refused.status_code == status
            assert refused.json()["error"]["type"] == "invalid_request_error"
        client.post(CHAT, json=body())
        text = client.get("/metrics").text
        assert 'vita_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
        assert 'status="400"' in text
        assert "vita_generation_tokens_total 3.0" in text
        assert "vita_time_to_first_token_seconds_count 1.0" in text


def test_a_key_is_asked_for() -> None:
    with serving(FakeEngine(), api_key="secret") as (address, _), httpx.Client(base_url=address) as client:
        for path in ("/health", "/ready", "/info"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            refused = client.post(CHAT, json=body(), headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.post(CHAT, json=body(), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_name_that_only_points_to_this_machine_is_refused() -> None:
    with serving(FakeEngine(), allowed_hosts=("Proxy.example",)) as (address, _):
        port = address.rpartition(":")[2]
        for host, status in (
            ("evil.example", 403), (f"evil.example:{port}", 403), ("", 403), (f"localhost:{port}", 200),
            ("[::1]:1", 200),
            ("[::1]", 200), ("127.0.0.1", 200), ("proxy.example", 200), ("LOCALHOST", 200),
        ):  # fmt: skip
            assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status, host


def test_the_same_request_joins_the_running_one() -> None:
    engine = FakeEngine(gate=threading.Semaphore(0))
    with serving(engine) as (address, service), ThreadPoolExecutor(4) as pool, httpx.Client(base_url=address) as client:

        def ask(**fields: Any) -> Any:
            return client.post(CHAT, json=body(**fields), timeout=30).json()

        same = [pool.submit(ask), pool.submit(ask)]
        own = [pool.submit(ask, temperature=1), pool.submit(ask, temperature=1)]
        wait_for(lambda: metric(address, "vita_requests_joined_total") == 1 and len(engine.running) == 3)
        engine.gate.release(100)  # type: ignore[union-attr]
        first, second = (one.result() for one in same)
        assert first["id"] == second["id"]
        assert first["choices"] == second["choices"]
        assert len({one.result()["id"] for one in own} | {first["id"]}) == 3
        assert service.pending.held == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_given_up(stream: bool) -> None:
    engine = FakeEngine(gate=threading.Semaphore(1))
    with serving(engine) as (address, service):
        data = json.dumps(body(stream=stream)).encode()
        host, port = address.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        wait_for(lambda: any(one.told for one in engine.running.values()))
        client.close()
        wait_for(lambda: not engine.running)
        assert engine.media[0].closed
        assert service.pending.held == 0
        assert metric(address, "vita_requests_cancelled_total") == 1


def test_more_than_may_wait_are_told_to_come_back() -> None:
    engine = FakeEngine(gate=threading.Semaphore(0))
    with serving(engine, max_queue=3) as (address, _), ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(httpx.post, address + CHAT, json=body(f"number {n}"), timeout=30) for n in range(3)]
        wait_for(lambda: len(engine.running) == 3)
        refused = httpx.post(address + CHAT, json=body("one more"))
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "max_queue=3" in refused.json()["error"]["message"]
        engine.gate.release(100)  # type: ignore[union-attr]
        assert all(one.result().status_code == 200 for one in waiting)


def test_bodies_have_limits_of_size_and_time() -> None:
    from megatron_vita.inference.openai.limits import Limits

    limits = Limits(body_bytes=1000)
    with serving(FakeEngine(), limits=limits, header_timeout=0.3) as (address, service):
        refused = httpx.post(address + CHAT, json=body("x" * 2000))
        assert refused.status_code == 413
        assert "body_bytes=1000" in refused.json()["error"]["message"]

        def pieces() -> Iterator[bytes]:
            for _ in range(300):
                yield b" " * 10

        chunked = httpx.post(address + CHAT, content=pieces(), headers={"Content-Type": "application/json"})
        assert chunked.status_code == 413
        host, port = address.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port))) as slow_body,
            socket.create_connection((host, int(port))) as slow_head,
        ):
            slow_body.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                "Content-Length: 100\r\n\r\n{".encode()
            )
            slow_head.sendall(b"GET /health HTTP/1.1\r\nHos")
            assert b" 408 " in slow_body.recv(1000)
            assert slow_head.recv(1000) == b""
        assert service.pending.held == 0


def test_a_lost_engine_fails_what_runs_and_ends_the_server() -> None:
    engine = FakeEngine(gate=threading.Semaphore(0))
    with serving(engine) as (address, service), ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, address + CHAT, json=body(), timeout=30)
        wait_for(lambda: len(engine.running) == 1)
        engine.failing = VitaError("rank 1 was lost")
        answer = running.result()
        assert answer.status_code == 503
        assert "rank 1 was lost" in answer.json()["error"]["message"]
        assert service.state == "failed"


def test_draining_answers_what_runs_and_lets_the_ranks_go() -> None:
    engine = FakeEngine(gate=threading.Semaphore(0))
    with serving(engine) as (address, service), ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, address + CHAT, json=body(), timeout=30)
        wait_for(lambda: len(engine.running) == 1)
        service.stop()
        wait_for(lambda: service.state == "draining")
        engine.gate.release(100)  # type: ignore[union-attr]
        assert running.result().status_code == 200
    assert engine.paused


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def wait_for(holds: Any) -> None:
    """Poll: the server's threads give no other sign."""
    event = threading.Event()
    for _ in range(1000):
        if holds():
            return
        event.wait(0.01)
    raise AssertionError("it did not come about within 10 s")
