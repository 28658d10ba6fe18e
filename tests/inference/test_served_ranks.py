"""What a server asks of ranks: guided answers, and requests that are given up at any moment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.data.sample import Sample
from megatron_vita.errors import DataError
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.grammar import ANY_OBJECT
from megatron_vita.inference.prompt import Generation, Request
from megatron_vita.inference.sampling import GREEDY, SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.parallel.kv_cache import KVCache
from tests.inference.tiny import question, save_checkpoint, write_media
from tests.ranks import run_ranks

pytest.importorskip("llguidance")

SCHEMA = json.dumps({
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "sure": {"enum": ["yes", "no"]}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
})  # fmt: skip
GUIDES = [
    SamplingConfig(guide=SCHEMA),
    SamplingConfig(guide=SCHEMA, temperature=1.5, seed=3),
    SamplingConfig(guide=SCHEMA, temperature=1.5, seed=4, logprobs=1, ignore_eos=True),
    SamplingConfig(guide=ANY_OBJECT, temperature=1.0, seed=5),
    SamplingConfig(temperature=1.0, seed=6),
    SamplingConfig(guide=json.dumps({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"})),
]
LAYOUTS = {
    "one": {},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_media(path)
    run_ranks(1, save_checkpoint, path)
    run_ranks(1, _serve, path, "one")
    return path


def sample_of(folder: Path) -> Sample:
    return question("Which digit is this?", images=[folder / "wide.jpg"], videos=[folder / "video.mp4"])


def _serve(folder: Path, layout: str) -> None:
    settings = EngineSettings(kv_cache_memory="8MiB", chunked_prefill_size=40, **LAYOUTS[layout])
    engine = Engine.load(folder / "tiny", settings)
    _guided(engine, folder / f"{layout}.json")
    _given_up(engine, sample_of(folder))
    if layout == "one":
        engine.close()
        block = KVCache.block_bytes(layers=2, block_size=16, groups=2, head_dim=8, dtype=torch.float32)
        _preempted(
            Engine.load(folder / "tiny", replace(settings, kv_cache_memory=str(10 * block))), folder / "one.json"
        )


def _ask(engine: Engine) -> list[Any]:
    """Answers, or the beginnings of errors."""
    engine.open = _Unchecked(engine.open)  # type: ignore[assignment]
    requests = [Request(str(n), question("the"), one, 120) for n, one in enumerate(GUIDES)]
    found: dict[str, Any] = {}
    for request, outcome in engine.run(requests if engine.leader else ()):
        if isinstance(outcome, Generation):
            found[request.id] = [outcome.text, outcome.finish_reason]
        else:
            assert isinstance(outcome, DataError)
            found[request.id] = str(outcome)[:60]
    return [found[key] for key in sorted(found)]


class _Unchecked:
    """Prepares what `check_guide` would refuse: what if something got past it?"""

    def __init__(self, prepare: Any) -> None:
        self._prepare = prepare

    def __call__(self, request: Request) -> Any:
        prepared = self._prepare(replace(request, sampling=replace(request.sampling, guide=None)))
        return replace(prepared, request=request)


def _guided(engine: Engine, out: Path) -> None:
    answers = _ask(engine)
    assert not engine.worker.sequences
    if not engine.leader:
        return
    for text, reason in answers[:3]:
        assert reason == "stop"
        got = json.loads(text)
        assert sorted(got) == ["digit", "sure"]
        assert 0 <= got["digit"] <= 9
        assert got["sure"] in ("yes", "no")
    text, reason = answers[3]
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)
    assert "cannot be continued" in answers[5]
    out.write_text(json.dumps(answers))


def _preempted(engine: Engine, expected: Path) -> None:
    """A full cache: guided answers are computed again from where they were."""
    assert _ask(engine) == json.loads(expected.read_text())
    assert engine.worker.scheduler.preemptions > 0


def _state(engine: Engine) -> list[Any]:
    """What a rank holds for requests."""
    worker = engine.worker
    held = [worker.sequences, worker.media, worker._texts, worker.runner._samplers, worker.scheduler.running]
    if worker.visual is not None:
        held += [worker.visual._pixels, worker.visual._kept, worker.visual._loaded]
    return [len(one) for one in held] + [len(worker.scheduler.waiting), worker.blocks.free_blocks()]


def _given_up(engine: Engine, sample: Sample) -> None:
    """At each step from the first to the last one, and before any."""
    clean = _state(engine)
    assert not any(clean[:-1])
    steps = 0
    more = True
    while more:
        if not engine.leader:
            engine.follow()
        else:
            for name in ("first", "second"):
                engine.add(Request(name, sample, SamplingConfig(guide=SCHEMA, temperature=1, ignore_eos=True), 6))
            engine.add(Request("other", question("the"), GREEDY, 30))
            ended = {one.request_id for _ in range(steps) for one in engine.step() if one.outcome is not None}
            for name in ("first", "second", "other", "nobody"):
                engine.abort(name)
            assert not engine.step()
            assert not engine.busy
            more = "first" not in ended
            engine.pause()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (_state(engine), more))
        more = everybody[0][1]
        for state, _ in everybody:  # of stages, some without a tower
            assert not any(state[:-1]), f"after {steps} steps"
            assert state[-1] == clean[-1], f"after {steps} steps"
        steps += 1
    assert steps > 6


def test_one_rank(folder: Path) -> None:
    assert (folder / "one.json").exists()


@pytest.mark.parametrize("layout", ["cp2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("pp2", "tp2"))])
def test_two_ranks(folder: Path, layout: str) -> None:
    run_ranks(2, _serve, folder, layout)
    assert json.loads((folder / f"{layout}.json").read_text()) == json.loads((folder / "one.json").read_text())
