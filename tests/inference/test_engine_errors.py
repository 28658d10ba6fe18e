"""What goes wrong with one request, one rank or the caller, and who hears of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.data.rejects import reject
from megatron_vita.data.sample import Sample
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.leader import from_leader
from megatron_vita.inference.prompt import Generation, Request
from megatron_vita.inference.prompt_media import PromptMedia
from megatron_vita.inference.sampling import GREEDY, SamplingConfig
from megatron_vita.inference.world import World
from megatron_vita.parallel.kv_cache import KVCache
from tests.inference.parity import load
from tests.inference.tiny import question, save_checkpoint, write_media
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
BLOCK = KVCache.block_bytes(layers=2, block_size=16, groups=2, head_dim=8, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    write_media(path)
    run_ranks(1, save_checkpoint, path)
    return path


def words(count: int) -> Sample:
    return question("the" + " the" * (count - 1))


def ask(number: int, sample: Sample, sampling: SamplingConfig = GREEDY, tokens: int = 4) -> Request:
    return Request(str(number), sample, sampling, max_new_tokens=tokens)


def outcomes_of(engine: Engine, requests: list[Request]) -> dict[str, Generation | VitaError]:
    found = {request.id: outcome for request, outcome in engine.run(requests if engine.leader else ())}
    idle(engine)
    return found


def idle(engine: Engine) -> None:
    """Nothing of earlier requests is left on this rank."""
    assert not engine.worker.sequences
    assert not engine.worker.media
    assert not engine.worker.scheduler.busy
    assert engine.worker.blocks.free_blocks() == engine.worker.cache.num_blocks


def _too_long(folder: Path) -> None:
    few, many = load(folder / "tiny", kv_cache_memory=str(9 * BLOCK)), load(folder / "tiny")
    assert (few.worker.blocks.capacity, many.config.max_position_embeddings) == (128, 512)
    for engine, count, limit in ((few, 150, 128), (many, 600, 512)):
        computed: list[int] = []
        run = engine.worker.runner.run

        def watch(batch: Any, visual: Any, run: Any = run, computed: Any = computed) -> Any:
            computed.extend(chunk.sequence.request.id for chunk in batch.plan.chunks)
            return run(batch, visual)

        engine.worker.runner.run = watch  # type: ignore[method-assign]
        found = outcomes_of(engine, [ask(0, words(5)), ask(1, words(count)), ask(2, words(7))])
        refused = found.pop("1")
        assert isinstance(refused, DataError)
        assert str(limit) in str(refused)
        assert int(str(refused).split(" tokens")[0].split()[-1]) > limit, "its own length is said, too"
        assert "1" not in computed, "refused before anything is computed"
        assert all(isinstance(one, Generation) and len(one.ids) == 4 for one in found.values())


def _too_long_an_answer(folder: Path) -> None:
    engine = load(folder / "tiny", kv_cache_memory=str(9 * BLOCK))
    found = outcomes_of(engine, [ask(0, words(90), tokens=60), ask(1, words(90), tokens=9)])
    assert "answer of up to 60" in str(found["0"]), "it would be cut, and be another with more memory"
    assert "holds 128" in str(found["0"])
    assert isinstance(found["1"], Generation)


def test_an_answer_that_never_fits_is_refused(folder: Path) -> None:
    run_ranks(1, _too_long_an_answer, folder)


def test_a_prompt_that_never_fits_is_refused_with_both_numbers(folder: Path) -> None:
    run_ranks(1, _too_long, folder)


def _later(folder: Path) -> None:
    engine = load(folder / "tiny", kv_cache_memory=str(9 * BLOCK))
    together = [ask(number, words(90), tokens=9) for number in range(3)]
    found = outcomes_of(engine, together)
    alone = engine.generate([words(90)], max_new_tokens=9)[0]
    assert alone.prompt_tokens > 64, "two at once do not fit"
    assert list(found.values()) == [alone] * 3
    assert list(found) == ["0", "1", "2"]


def test_a_prompt_that_fits_later_waits(folder: Path) -> None:
    run_ranks(1, _later, folder)


def _one_rank_cannot_read(folder: Path, layout: str) -> None:
    engine = load(folder / "tiny", chunked_prefill_size=8, **LAYOUTS[layout])
    wide = folder / "wide.jpg"
    samples = [question("Which?", images=[wide]), question("the", images=[wide]), words(9)]
    good = outcomes_of(engine, [ask(number, sample) for number, sample in enumerate(samples)])
    tiles = PromptMedia.tiles
    last = dist.get_rank() == (0 if layout == "pp2" else 1)  # a later stage has no tower

    def fail(self: PromptMedia, start: int, stop: int) -> torch.Tensor:
        if last:
            raise reject("bad_image", "wide.jpg: gone on one rank")
        return tiles(self, start, stop)

    for broken in ([0], [0, 1]):
        opened = engine.worker._open_media

        def open_media(sequence: Any, opened: Any = opened, broken: Any = broken) -> Any:
            pixels = opened(sequence)
            if int(sequence.request.id) in broken:
                pixels.tiles = fail.__get__(pixels)
            return pixels

        assert engine.worker.visual is not None or layout == "pp2"
        if engine.worker.visual is not None:
            engine.worker.visual._open = open_media
        found = outcomes_of(engine, [ask(number, sample) for number, sample in enumerate(samples)])
        if engine.leader:
            for number in range(3):
                outcome = found[str(number)]
                if number in broken:
                    assert isinstance(outcome, DataError)
                    assert "gone on one rank" in str(outcome)
                else:
                    assert outcome == good[str(number)]
        if engine.worker.visual is not None:
            engine.worker.visual._open = opened


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_that_fails_on_one_rank_fails_its_request_alone(folder: Path, layout: str) -> None:
    run_ranks(2, _one_rank_cannot_read, folder, layout)


def _truncated(folder: Path, layout: str) -> None:
    engine = load(folder / "tiny", chunked_prefill_size=8, **LAYOUTS[layout])
    copy = folder / f"{layout}.png"
    if engine.leader:
        copy.write_bytes((folder / "square.png").read_bytes())
        engine.add(ask(0, question("Which?", images=[copy])))
        engine.add(ask(1, question("Which?", images=[folder / "square.png"])))
        copy.write_bytes(copy.read_bytes()[:40])
        found = {}
        while engine.busy:
            found.update({one.request_id: one.outcome for one in engine.step() if one.outcome is not None})
        engine.pause()
        assert isinstance(found["0"], DataError)
        assert isinstance(found["1"], Generation)
    else:
        engine.follow()
    idle(engine)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cp2", "tp2"])
def test_a_file_that_is_cut_after_its_header_was_read(folder: Path, layout: str) -> None:
    run_ranks(2, _truncated, folder, layout)


def _bad_settings(folder: Path, layout: str) -> None:
    engine = load(folder / "tiny", **LAYOUTS[layout])
    beyond = engine.config.vocab_size
    bad = [SamplingConfig(logit_bias=((beyond, 1.0),)), SamplingConfig(stop_token_ids=(beyond,))]
    found = outcomes_of(engine, [ask(number, words(3), one) for number, one in enumerate([GREEDY, *bad, GREEDY])])
    if engine.leader:
        assert found["0"] == found["3"]
        for number in ("1", "2"):
            assert isinstance(found[number], ConfigError)
            assert str(beyond) in str(found[number])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_token_beyond_the_vocabulary_fails_its_request_alone(folder: Path, layout: str) -> None:
    run_ranks(2, _bad_settings, folder, layout)


class CallerError(Exception):
    """A defect of the caller."""


def consume(engine: Engine, requests: list[Request]) -> None:
    for _ in engine.run(requests):
        raise CallerError


def _caller_fails(folder: Path, layout: str) -> None:
    engine = load(folder / "tiny", chunked_prefill_size=8, **LAYOUTS[layout])
    samples = [words(3 + number) for number in range(6)]
    requests = [ask(number, sample, tokens=3 + number) for number, sample in enumerate(samples)]
    good = outcomes_of(engine, requests)

    def source() -> Iterator[Request]:
        yield from requests[:4]
        raise CallerError

    if engine.leader:
        with pytest.raises(CallerError):
            consume(engine, requests)
        idle(engine)
        with pytest.raises(CallerError):
            list(engine.run(source()))
        for _ in engine.run(requests):
            break
    else:
        for _ in range(3):
            assert list(engine.run(())) == []
            idle(engine)
    assert outcomes_of(engine, requests) == good


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_caller_that_fails_leaves_no_rank_waiting(folder: Path, layout: str) -> None:
    run_ranks(2, _caller_fails, folder, layout)


def _begun_again(folder: Path) -> None:
    small = {"block_size": 2, "kv_cache_memory": str(45 * BLOCK // 8), "chunked_prefill_size": 2}
    engine, large = load(folder / "tiny", **small), load(folder / "tiny")
    requests = [ask(0, words(2), tokens=60), ask(1, words(40), SamplingConfig(prompt_logprobs=1))]
    found = outcomes_of(engine, requests)
    assert engine.worker.scheduler.preemptions == 1
    again = outcomes_of(large, requests)
    for number in ("0", "1"):
        one, other = found[number], again[number]
        assert isinstance(one, Generation)
        assert isinstance(other, Generation)
        assert one.ids == other.ids
        if number == "1":
            assert one.prompt_logprobs is not None
            assert other.prompt_logprobs is not None
            told = [
                [entry.id for entry in all_of[1:] if entry] for all_of in (one.prompt_logprobs, other.prompt_logprobs)
            ]
            assert told[0] == told[1]
            assert len(told[0]) == one.prompt_tokens - 1


def test_a_prompt_that_is_begun_again_tells_its_log_probabilities_once(folder: Path) -> None:
    run_ranks(1, _begun_again, folder)


def _die_early(folder: Path, path: str) -> None:
    """While the model is loaded, and while rank 0 reads what it is asked."""

    def read() -> None:
        os._exit(3)

    def die(*_: object) -> int:
        os._exit(3)

    if path.endswith("load") and dist.get_rank() == 0:
        World.smallest = die  # type: ignore[method-assign]
    act: Any = partial(load, folder / "tiny", **LAYOUTS["cp2"]) if path.endswith("load") else partial(from_leader, read)
    with pytest.raises(VitaError) as caught:
        act()
    Path(path).write_text(str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["load", "read"])
def test_a_rank_that_dies_before_the_first_step_ends_the_others(folder: Path, tmp_path: Path, when: str) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 2 died"):
        run_ranks(2, _die_early, folder, str(tmp_path / when), timeout_s=30)
    assert (tmp_path / when).read_text().startswith("rank 1 of 2: another rank was lost")


def _die(folder: Path, layout: str, how: str, victim: int, path: str) -> None:
    engine = load(folder / "tiny", chunked_prefill_size=8, **LAYOUTS[layout])
    run, steps = engine.worker.runner.run, []

    def die(batch: Any, visual: Any) -> Any:
        steps.append(batch)
        if len(steps) == 5 and dist.get_rank() == victim:
            os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
        return run(batch, visual)

    engine.worker.runner.run = die  # type: ignore[method-assign]
    requests = [ask(number, words(5 + number), tokens=20) for number in range(4)]
    with pytest.raises(VitaError) as caught:
        list(engine.run(requests if engine.leader else ()))
    Path(path).write_text(str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("how", "victim"), [("exit", 1), ("kill", 1), ("kill", 0)])
def test_a_rank_that_dies_ends_the_others_with_a_message(
    folder: Path, tmp_path: Path, layout: str, how: str, victim: int
) -> None:
    """No rank waits for a timeout: run_ranks would say that it hung."""
    with pytest.raises(AssertionError, match=rf"ranks \[{victim}\] of 2 died"):
        run_ranks(2, _die, folder, layout, how, victim, str(tmp_path / "said"), timeout_s=30)
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"rank {1 - victim} of 2: another rank was lost")
    assert "memory" in said
