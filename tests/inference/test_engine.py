"""The engine against the plainest thing that could answer: a whole forward pass for each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.convert.identity import fingerprint
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.media import on_demand
from megatron_vita.data.media.open import read_items
from megatron_vita.data.media.tiling import render_tiles
from megatron_vita.data.media.video.open import VideoFile, VideoLimits, open_video
from megatron_vita.data.sample import MediaFile, Message, Sample, Text
from megatron_vita.data.text.chat import build_example
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.inference.engine import Engine, model_name
from megatron_vita.inference.openai import LimitError, Limits
from megatron_vita.inference.prompt import Generation, RawPrompt, Request, TokenLogprob
from megatron_vita.inference.sampling import GREEDY, SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from megatron_vita.layout import SequenceLayout, TileRoutes
from megatron_vita.models import cached_forward
from megatron_vita.parallel.kv_cache import KVCache
from tests.inference.tiny import SPEC, question, save_checkpoint, write_media


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def media(folder: Path) -> dict[str, Path]:
    return write_media(folder)


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    return save_checkpoint(folder)


def load(root: Path, **settings: Any) -> Engine:
    """An engine whose random model never ends an answer itself: it would rarely do so anyway."""
    engine = Engine.load(root, EngineSettings(**{"kv_cache_memory": "64MiB", **settings}))
    engine.worker.ends = frozenset()
    return engine


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return load(root)


@pytest.fixture(scope="module")
def samples(media: dict[str, Path]) -> list[Sample]:
    """Prompts of different lengths: text, a picture, tiles, several pictures, a video, all together."""
    return [
        question("Which digit is this?"),
        question("Which digit is this?", images=[media["square"]]),
        question("And the answer?", images=[media["wide"]]),
        question("Which of the three?", images=[media["square"], media["wide"], media["square"]]),
        question("Which digit is this picture?", videos=[media["video"]]),
        question("the", images=[media["wide"]], videos=[media["video"]]),
    ]


@torch.no_grad()
def plain_logits(engine: Engine, sample: Sample | RawPrompt, more: Sequence[int]) -> torch.Tensor:
    """Logits after the prompt and `more`, by one pass over all of it, without a cache; [v]."""
    example, media = engine.prepare(Request("plain", sample, GREEDY))
    tokens = torch.from_numpy(np.concatenate([example.tokens, more]).astype(np.int64))
    layout = SequenceLayout((len(tokens),))
    first = np.array([slot.first_token for slot in example.tiles], dtype=np.int64)
    logits = engine.model(
        tokens=tokens[None],
        positions=torch.arange(len(tokens))[None],
        layout=layout,
        routes=TileRoutes(layout, first, SPEC.tokens_per_tile),
        tiles=media.tiles(0, len(example.tiles)),
        logits_indices=torch.tensor([len(tokens) - 1]),
    )
    return logits[0]


def plain_greedy(engine: Engine, sample: Sample | RawPrompt, count: int) -> tuple[int, ...]:
    said: list[int] = []
    for _ in range(count):
        said.append(int(plain_logits(engine, sample, said).argmax()))
    return tuple(said)


@pytest.fixture(scope="module")
def expected(engine: Engine, samples: list[Sample]) -> list[tuple[int, ...]]:
    greedy = [plain_greedy(engine, sample, 7) for sample in samples]
    assert len(set(greedy)) > 3, "the samples should not all be answered alike"
    return greedy


def ids_of(answers: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("chunk", [4096, 64, 33, 16, 15, 1])
def test_any_chunk_gives_what_a_whole_pass_for_each_token_gives(
    root: Path, samples: list[Sample], expected: list[tuple[int, ...]], chunk: int
) -> None:
    engine = load(root, chunked_prefill_size=chunk)
    answers = engine.generate(samples, max_new_tokens=7)
    assert ids_of(answers) == expected
    assert {answer.finish_reason for answer in answers} == {"length"}
    tiles = [len(engine.prepare(Request("", sample, GREEDY))[0].tiles) for sample in samples]
    assert engine.worker.visual is not None
    assert engine.worker.visual.encoded == sum(tiles), "every tile is encoded once"
    assert engine.worker.blocks.free_blocks() == engine.worker.cache.num_blocks, "every block is given back"
    alone = [engine.generate([sample], max_new_tokens=7)[0] for sample in samples]
    assert ids_of(alone) == expected


def test_logits_of_every_step_are_those_of_a_whole_pass(root: Path, samples: list[Sample]) -> None:
    engine = load(root, chunked_prefill_size=20)
    seen: list[tuple[str, int, torch.Tensor]] = []
    choose = engine.worker.runner.choose

    def record(logits: torch.Tensor, sequences: Any) -> Any:
        seen.extend((one.request.id, len(one.generated), row) for one, row in zip(sequences, logits, strict=True))
        return choose(logits, sequences)

    engine.worker.runner.choose = record  # type: ignore[method-assign]
    answers = engine.generate(samples, max_new_tokens=4)
    assert len(seen) == 4 * len(samples)
    for number, length, logits in seen:
        want = plain_logits(engine, samples[int(number)], answers[int(number)].ids[:length])
        torch.testing.assert_close(logits, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["chunked", "full"])
def test_every_head_gives_the_same_tokens(
    root: Path, samples: list[Sample], expected: list[tuple[int, ...]], head: str
) -> None:
    assert ids_of(load(root, lm_head=head, chunked_prefill_size=40).generate(samples, max_new_tokens=7)) == expected


def test_modules_that_hold_their_weights_otherwise_are_called_as_they_are(
    root: Path, samples: list[Sample], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's are such modules; here megatron-core's own stand for them."""
    monkeypatch.setattr(cached_forward, "_is_plain", lambda decoder: False)
    assert ids_of(load(root, chunked_prefill_size=20).generate(samples, max_new_tokens=7)) == expected


def test_a_full_cache_makes_the_youngest_wait(
    root: Path, samples: list[Sample], expected: list[tuple[int, ...]]
) -> None:
    engine = load(root)
    block = KVCache.block_bytes(layers=2, block_size=16, groups=2, head_dim=8, dtype=torch.float32)
    small = load(root, kv_cache_memory=str(8 * block))
    assert small.worker.cache.num_blocks == 8
    again = [*samples, *samples]
    assert ids_of(small.generate(again, max_new_tokens=7)) == [*expected, *expected]
    short = question("Which digit is this?")
    long = small.generate([short] * 4, max_new_tokens=60)
    assert small.worker.scheduler.preemptions > 0, "four answers of 60 tokens do not fit at once"
    assert ids_of(long) == ids_of(engine.generate([short] * 4, max_new_tokens=60))
    with pytest.raises(DataError, match="overlong"):
        small.generate([question("the" + " the the" * 100)])


@pytest.mark.parametrize("chunk", [9, 18, 62])
def test_a_prompt_that_is_preempted_on_its_way_is_answered_alike(root: Path, samples: list[Sample], chunk: int) -> None:
    """It was stopped within a tile, and comes back in one chunk."""
    asked = SamplingConfig(temperature=0.8, repetition_penalty=1.2, logprobs=1, prompt_logprobs=1)
    request = Request("again", samples[5], asked, 6)
    engine = load(root)
    ((_, expected),) = engine.run([request])
    scheduler = engine.worker.scheduler
    scheduler.budget, whole = chunk, scheduler.budget
    engine.add(request)
    for steps in (1, 1, 3):  # the second time all at once, then while it decodes
        for _ in range(steps):
            engine.step()
        scheduler.preempt()
        scheduler.budget = whole
    ((_, answer),) = [(output.text, output.outcome) for _ in range(6) for output in engine.step() if output.outcome]
    assert isinstance(expected, Generation)
    assert isinstance(answer, Generation)
    assert (answer.text, answer.ids) == (expected.text, expected.ids)
    assert answer.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == answer.prompt_tokens
    for one, other in zip(answer.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert other is not None
        assert (one.id, one.logprob) == (other.id, pytest.approx(other.logprob, abs=1e-4))


def test_a_shared_prefix_is_computed_once(
    root: Path, media: dict[str, Path], samples: list[Sample], expected: list[tuple[int, ...]]
) -> None:
    shared = [question(text, videos=[media["video"]]) for text in ("Which digit?", "Which picture?", "And the?")]
    plain = ids_of(load(root).generate(shared, max_new_tokens=5))
    engine = load(root, enable_prefix_caching=True)
    answers = engine.generate(shared, max_new_tokens=5)
    assert ids_of(answers) == plain
    assert answers[0].cached_tokens == 0
    assert min(answer.cached_tokens for answer in answers[1:]) >= 32
    assert engine.worker.visual is not None
    assert engine.worker.visual.encoded == 5 + 2, "only a frame that is not wholly shared is encoded again"
    again = engine.generate(shared[:1], max_new_tokens=5)[0]
    assert again.ids == plain[0]
    assert again.cached_tokens >= 32, "blocks outlive their sequence"
    blind = engine.generate(shared[:1], max_new_tokens=5, zero_tiles=True)[0]
    assert blind.cached_tokens < 32, "black tiles are other pictures"
    assert ids_of(engine.generate(samples, max_new_tokens=7)) == expected


def test_sequences_leave_when_they_end(root: Path, samples: list[Sample], expected: list[tuple[int, ...]]) -> None:
    engine = load(root)
    # Tokens that some say early and some late (or never) serve as ends.
    engine.worker.ends = frozenset({expected[0][1], expected[1][3], expected[2][0]})
    for cut, full in zip(engine.generate(samples, max_new_tokens=7), expected, strict=True):
        end = next((place for place, token in enumerate(full) if token in engine.worker.ends), None)
        assert cut.finished == (end is not None)
        assert cut.ids == full[:end]
    assert engine.generate(samples[2:3], max_new_tokens=7)[0].ids == ()


def test_sampling_does_not_depend_on_company(engine: Engine, samples: list[Sample]) -> None:
    warm = SamplingConfig(temperature=1.5, top_k=20, seed=3)
    together = engine.generate(samples, max_new_tokens=4, sampling=warm)
    assert together == [engine.generate([one], max_new_tokens=4, sampling=warm)[0] for one in samples]
    assert together != engine.generate(samples, max_new_tokens=4)


def test_logprobs_of_answers_and_prompts(engine: Engine, samples: list[Sample]) -> None:
    asked = SamplingConfig(logprobs=2, prompt_logprobs=3)
    for sample, answer in zip(samples, engine.generate(samples, max_new_tokens=3, sampling=asked), strict=True):
        assert answer.logprobs is not None
        assert answer.prompt_logprobs is not None
        for place, entry in enumerate(answer.logprobs):
            want = torch.log_softmax(plain_logits(engine, sample, answer.ids[:place]), dim=-1)
            assert entry.id == answer.ids[place]
            assert entry.logprob == pytest.approx(float(want.max()), abs=1e-4)
            assert entry.top[0] == (entry.id, entry.logprob)
            assert len(entry.top) == 2
        tokens = engine.prepare(Request("", sample, GREEDY))[0].tokens.tolist()
        assert answer.prompt_logprobs[0] is None
        assert [entry.id for entry in answer.prompt_logprobs[1:] if entry] == tokens[1:]
        assert all(entry is not None and len(entry.top) == 3 for entry in answer.prompt_logprobs[1:])
    text = engine.prepare(Request("", samples[0], GREEDY))[0].tokens
    last = engine.generate(samples[:1], max_new_tokens=1, sampling=asked)[0].prompt_logprobs
    layout = SequenceLayout((len(text),))
    with torch.no_grad():
        logits = engine.model(
            tokens=torch.from_numpy(text.astype(np.int64))[None], positions=torch.arange(len(text))[None],
            layout=layout, routes=TileRoutes(layout, np.empty(0, dtype=np.int64), SPEC.tokens_per_tile),
            tiles=torch.empty(0, 3, 16, 16, dtype=torch.uint8), logits_indices=torch.arange(len(text) - 1),
        )  # fmt: skip
    want = torch.log_softmax(logits, -1)[torch.arange(len(text) - 1), torch.from_numpy(text[1:].astype(np.int64))]
    assert last is not None
    torch.testing.assert_close(torch.tensor([one.logprob for one in last[1:] if one]), want, atol=1e-4, rtol=0)


def test_stop_strings_and_ids(engine: Engine, samples: list[Sample], expected: list[tuple[int, ...]]) -> None:
    whole = engine.generate(samples[:1], max_new_tokens=7)[0]
    by_id = engine.generate(samples[:1], sampling=SamplingConfig(stop_token_ids=(expected[0][3],)))[0]
    assert (by_id.ids, by_id.stop_reason, by_id.finish_reason) == (expected[0][:3], expected[0][3], "stop")
    stop = whole.text[3:6]
    by_text = engine.generate(samples[:1], sampling=SamplingConfig(stop=(stop,)))[0]
    assert by_text.text == whole.text[: whole.text.index(stop)]
    assert (by_text.stop_reason, by_text.finish_reason) == (stop, "stop")


def test_requests_come_and_go_between_steps(
    engine: Engine, samples: list[Sample], expected: list[tuple[int, ...]]
) -> None:
    texts: dict[str, str] = {}
    logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
    answers: dict[str, Any] = {}
    waiting = list(enumerate(samples))
    steps = 0
    while engine.busy or waiting:
        if waiting and steps % 2 == 0:
            number, sample = waiting.pop()
            engine.add(Request(str(number), sample, SamplingConfig(logprobs=1), max_new_tokens=7))
            if number == 3:
                with pytest.raises(ConfigError, match="own id"):
                    engine.add(Request("3", sample, GREEDY))
        if steps == 5:
            engine.abort("5")
            with pytest.raises(ConfigError, match="other requests"):
                next(engine.run([]))
        for output in engine.step():
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
            logprobs[output.request_id] = logprobs.get(output.request_id, ()) + output.logprobs
            if output.outcome is not None:
                answers[output.request_id] = output.outcome
        steps += 1
    assert sorted(answers) == ["0", "1", "2", "3", "4"], "the aborted one gives nothing"
    for number, answer in answers.items():
        assert answer.ids == expected[int(number)]
        assert answer.text == texts[number]
        assert answer.logprobs == logprobs[number]


def test_zeroed_tiles_keep_lengths_and_change_answers(engine: Engine, samples: list[Sample]) -> None:
    asked = SamplingConfig(logprobs=1)
    seen, blind = (engine.generate(samples[3:4], sampling=asked, zero_tiles=zero)[0] for zero in (False, True))
    assert seen.prompt_tokens == blind.prompt_tokens
    assert seen.logprobs is not None
    assert blind.logprobs is not None
    assert abs(seen.logprobs[0].logprob - blind.logprobs[0].logprob) > 1e-3


def test_a_request_says_how_many_frames_it_wants(engine: Engine, root: Path, samples: list[Sample]) -> None:
    """The same answer as by an engine whose preprocessing says so, which also reopens media with it (decoding)."""
    video = next(sample for sample in samples if sample.videos)
    requests = [Request(str(most), video, GREEDY, 5, max_frames=most) for most in (1, 2, 3)]
    answers = {int(request.id): answer for request, answer in engine.run(requests)}
    assert [len(engine.prepare(request)[0].media) for request in requests] == [1, 2, 3]
    (fewer,) = load(root, max_frames=2).generate([video], max_new_tokens=5)
    assert answers[2] == fewer
    assert isinstance(answers[3], Generation)
    with pytest.raises(ConfigError, match="max_frames=0"):
        engine.prepare(Request("0", video, GREEDY, max_frames=0))


def test_an_answer_is_as_long_as_the_context_allows_if_that_is_asked_for(root: Path, samples: list[Sample]) -> None:
    """VLMEvalKit asks for 32,768 tokens of any model."""
    small = load(root, max_position_embeddings=48, kv_cache_memory="16KiB")
    length = len(small.prepare(Request("0", samples[0], GREEDY))[0].tokens)
    outcomes = dict(small.run([Request("clamped", samples[0], GREEDY, 32768, clamp_length=True)]))
    (answer,) = outcomes.values()
    assert isinstance(answer, Generation)
    assert (answer.finish_reason, len(answer.ids)) == ("length", small.worker.longest - length)
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens, but the .* \d+"):
        small.prepare(Request("1", question("the " * 60), GREEDY, 32768, clamp_length=True))


def test_decoding_a_video_has_a_time_limit_wherever_it_is_opened(
    root: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = load(root, video_timeout=77.0)
    seen: list[float] = []

    def opened(file: MediaFile, backend: str, *, limits: VideoLimits) -> VideoFile:
        seen.append(limits.timeout)
        return open_video(file, backend, limits=limits)

    monkeypatch.setattr(on_demand, "open_video", opened)
    video = next(sample for sample in samples if sample.videos)
    first = limited.open(Request("0", video, GREEDY, 2))
    limited.open(Request("1", video, GREEDY, 2), like=first)
    limited.enqueue(first)
    limited.worker.media.clear()  # as on a rank that is not the leader
    while limited.busy:
        limited.step(stream=False)
    assert seen == [77.0, 77.0, 77.0]


def test_choices_share_their_ids(root: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second choice is prepared from the first, and gets the answer that it has by itself."""
    sharing = load(root, enable_prefix_caching=True)
    for number, sample in enumerate((*samples, RawPrompt(text="Which digit"))):
        requests = [
            Request(f"{number}-{place}", sample, SamplingConfig(temperature=1, seed=place), 5) for place in (0, 1)
        ]
        expected = {
            request.id: answer.ids for request, answer in sharing.run(requests) if not isinstance(answer, VitaError)
        }
        first = sharing.open(requests[0])
        second = sharing.open(requests[1], like=first)
        assert second.example is first.example
        assert second.keys == first.keys
        for prepared in (first, second):
            sharing.enqueue(prepared)
        answers = {}
        while sharing.busy:
            for output in sharing.step(stream=False):
                if isinstance(output.outcome, Generation):
                    answers[output.request_id] = output.outcome.ids
        assert answers == expected


def test_a_text_is_continued_without_a_chat_template(engine: Engine) -> None:
    ids = tuple(engine.tokenizer.encode("Which digit", first=True))
    (text, same, special) = (
        RawPrompt(text="Which digit"), RawPrompt(ids=ids), RawPrompt(ids=(*ids, engine.tokenizer.eos_id)),
    )  # fmt: skip
    requests = [Request(str(place), one, GREEDY, 4) for place, one in enumerate((text, same, special))]
    prompts = [tuple(engine.prepare(request)[0].tokens) for request in requests]
    assert prompts == [ids, ids, (*ids, engine.tokenizer.eos_id)]
    answers = {request.id: answer for request, answer in engine.run(requests)}
    first = answers["0"]
    assert isinstance(first, Generation)
    assert first == answers["1"] != answers["2"]
    assert first.ids == plain_greedy(engine, text, 4)
    with pytest.raises(DataError, match="empty_turn"):
        engine.prepare(Request("3", RawPrompt(), GREEDY))


def test_tokens_and_their_logprobs_are_limited(engine: Engine) -> None:
    asked = Request("0", RawPrompt(ids=(1, 2, 3)), SamplingConfig(prompt_logprobs=2))
    engine.open(asked, Limits(prompt_tokens=3, prompt_logprobs=9))
    for limits in (Limits(prompt_tokens=2), Limits(prompt_logprobs=8)):
        with pytest.raises(LimitError, match="is the limit"):
            engine.open(asked, limits)


def test_ids_and_pixels_are_those_of_training(engine: Engine, samples: list[Sample]) -> None:
    for sample in samples:
        answered = Sample(
            messages=(*sample.messages, Message("assistant", (Text("seven"),))),
            images=sample.images,
            videos=sample.videos,
            source=sample.source,
            line=sample.line,
        )
        images, videos = read_items(answered, SPEC)
        trained = build_example(answered, images, videos, tokenizer=engine.tokenizer, spec=SPEC)
        example, media = engine.prepare(Request("", sample, GREEDY))
        length = len(example.tokens)
        np.testing.assert_array_equal(example.tokens, trained.tokens[:length])
        assert trained.labels[length - 1] == trained.tokens[length], "the first label is the answer's first token"
        assert (trained.labels[: length - 1] == IGNORE_INDEX).all()
        assert example.tiles == trained.tiles
        for tile, slot in enumerate(trained.tiles):
            pixels = render_tiles(trained.media[slot.media], [slot], SPEC)[0]
            np.testing.assert_array_equal(media.tiles(tile, tile + 1)[0].numpy(), pixels)


def test_the_limit_of_positions_ends_an_answer(engine: Engine) -> None:
    longest = engine.config.max_position_embeddings

    def length(text: str) -> int:
        return len(engine.prepare(Request("", question(text), GREEDY))[0].tokens)

    short = length("the")
    per_word = length("the the the") - short
    text = "the" + " the the" * ((longest - short - 3) // per_word)
    room = longest - length(text)
    assert 0 < room < 20
    assert len(engine.generate([question(text)], max_new_tokens=50)[0].ids) == room
    with pytest.raises(DataError, match="overlong"):
        engine.generate([question("the" + " the the" * longest)])


def test_an_unreadable_sample_does_not_stop_the_others(engine: Engine, samples: list[Sample], folder: Path) -> None:
    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    mixed = [samples[0], question("Which?", images=[broken]), samples[1]]
    requests = [Request(str(number), sample, GREEDY, max_new_tokens=3) for number, sample in enumerate(mixed)]
    outcomes = {request.id: outcome for request, outcome in engine.run(requests)}
    assert isinstance(outcomes["1"], DataError)
    assert [outcomes["0"], outcomes["2"]] == engine.generate(samples[:2], max_new_tokens=3)
    with pytest.raises(DataError, match=r"broken\.png"):
        engine.generate(mixed)
    assert not engine.busy, "the others are given up"


@pytest.mark.slow
def test_the_other_ranks_are_let_go_unless_nobody_knows_where_they_are(
    root: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pauses = load(root), []
    monkeypatch.setattr(engine, "pause", lambda: pauses.append(1))
    requests = [Request(str(number), sample, GREEDY, 2) for number, sample in enumerate(samples)]
    assert len(list(engine.run(requests))) == len(samples)
    assert len(pauses) == 1
    run = engine.run(requests)
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert len(pauses) == 2
    assert not engine.busy, "what was asked is given up"

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.worker, "step", broken)
    with pytest.raises(RuntimeError):
        list(engine.run(requests))
    assert len(pauses) == 2, "a message would not be heard, and the error not be told"


def test_models_are_loaded_one_after_another(folder: Path, root: Path, samples: list[Sample]) -> None:
    (folder / "second").mkdir()
    other = save_checkpoint(folder / "second", name="other", seed=2)
    answers = []
    for path in (root, other, checkpoint.resolve(root)):
        engine = Engine.load(path)
        answers.append(engine.generate(samples, max_new_tokens=4))
        engine.close()
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    assert (model_name(root), model_name(other)) == ("tiny", "other")
    assert fingerprint(checkpoint.resolve(root)) != fingerprint(checkpoint.resolve(other))


def test_a_text_model_refuses_pictures(folder: Path, samples: list[Sample]) -> None:
    (folder / "text").mkdir()
    engine = Engine.load(save_checkpoint(folder / "text", vision=False))
    assert engine.generate(samples[:1], max_new_tokens=3)
    with pytest.raises(ConfigError, match="text-only"):
        engine.generate(samples[1:2])


def test_ranks_that_heads_do_not_divide_over_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="num_query_groups=2 is not a multiple"):
        Engine.load(root, EngineSettings(tensor_model_parallel_size=4))


@pytest.mark.parametrize("tokens", [0, -1])
def test_an_answer_without_tokens_is_refused(engine: Engine, tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_new_tokens={tokens} must be at least 1"):
        engine.generate([question("the")], max_new_tokens=tokens)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Engine.load(tmp_path / "nothing")


def test_a_token_that_the_model_does_not_have_fails_its_request_alone(engine: Engine) -> None:
    wrong = SamplingConfig(stop_token_ids=(engine.config.vocab_size,))
    requests = [Request("wrong", question("the"), wrong, 2), Request("right", question("the"), GREEDY, 2)]
    outcomes = {request.id: outcome for request, outcome in engine.run(requests)}
    assert "stop_token_ids names token" in str(outcomes["wrong"])
    assert isinstance(outcomes["right"], Generation)


def test_a_stop_string_ends_no_answer_that_is_too_short(engine: Engine) -> None:
    def answer(**settings: Any) -> Generation:
        return engine.generate([question("the")], max_new_tokens=8, sampling=SamplingConfig(**settings))[0]

    whole = answer(logit_bias=((engine.tokenizer.encode("a")[0], 100.0),))
    assert whole.text == "a" * 8
    bias: dict[str, Any] = {"logit_bias": ((engine.tokenizer.encode("a")[0], 100.0),), "stop": ("aa",)}
    for least, length in ((0, 2), (4, 5), (8, 8)):
        stopped = answer(**bias, min_tokens=least)
        assert len(stopped.ids) == length
        assert (stopped.finish_reason, stopped.stop_reason) == (("length", None) if least == 8 else ("stop", "aa"))
        assert stopped.text == "a" * (8 if least == 8 else length - 2)
