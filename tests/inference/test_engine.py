"""The engine against the plainest thing that could answer: a whole forward pass for each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vita import checkpoint
from megatron_vita.convert.identity import fingerprint
from megatron_vita.data.example import IGNORE_INDEX
from megatron_vita.data.media.open import read_items
from megatron_vita.data.media.tiling import render_tiles
from megatron_vita.data.sample import Message, Sample, Text
from megatron_vita.data.text.chat import build_example
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.inference.engine import Engine, Prompt, model_name
from megatron_vita.inference.sampling import SamplingConfig
from megatron_vita.layout import SequenceLayout, TileRoutes
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


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return Engine.load(root)


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
def plain_logits(engine: Engine, prompt: Prompt, more: list[int]) -> torch.Tensor:
    """Logits after the prompt and `more`, by one pass over all of it, without a cache; [v]."""
    tokens = torch.from_numpy(np.concatenate([prompt.example.tokens, more]).astype(np.int64))
    layout = SequenceLayout((len(tokens),))
    first = np.array([slot.first_token for slot in prompt.example.tiles], dtype=np.int64)
    logits = engine.model(
        tokens=tokens[None],
        positions=torch.arange(len(tokens))[None],
        layout=layout,
        routes=TileRoutes(layout, first, SPEC.tokens_per_tile),
        tiles=prompt.tiles,
        logits_indices=torch.tensor([len(tokens) - 1]),
    )
    return logits[0]


def plain_greedy(engine: Engine, sample: Sample, count: int) -> list[int]:
    prompt, said = engine.prepare(sample), []
    for _ in range(count):
        said.append(int(plain_logits(engine, prompt, said).argmax()))
    return said


def test_cached_batch_equals_a_whole_pass_for_each_token(engine: Engine, samples: list[Sample]) -> None:
    engine._ends = frozenset()  # a random model would rarely end; here none does
    expected = [plain_greedy(engine, sample, 7) for sample in samples]
    assert len({tuple(ids) for ids in expected}) > 3, "the samples should not all be answered alike"
    together = engine.generate(samples, max_new_tokens=7)
    assert [list(one.ids) for one in together] == expected
    assert not any(one.finished for one in together)
    alone = [engine.generate([sample], max_new_tokens=7)[0] for sample in samples]
    assert alone == together
    small_rows = engine.generate(samples, max_new_tokens=7, batch_tokens=60)
    assert small_rows == together


def test_logits_do_not_depend_on_the_neighbours(engine: Engine, samples: list[Sample]) -> None:
    prompts = [engine.prepare(sample) for sample in samples]
    with torch.no_grad():
        together = engine.prefill(prompts, None)
    alone = torch.stack([plain_logits(engine, prompt, []) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_sequences_leave_the_row_when_they_end(engine: Engine, samples: list[Sample]) -> None:
    engine._ends = frozenset()
    whole = engine.generate(samples, max_new_tokens=7)
    # Tokens that some say early and some late (or never) serve as ends.
    engine._ends = frozenset({whole[0].ids[1], whole[1].ids[3], whole[2].ids[0]})
    for cut, full in zip(engine.generate(samples, max_new_tokens=7), whole, strict=True):
        end = next((place for place, token in enumerate(full.ids) if token in engine._ends), None)
        assert cut.finished == (end is not None)
        assert cut.ids == full.ids[:end]
    assert engine.generate(samples[2:3], max_new_tokens=7)[0].ids == ()


def test_sampling_does_not_depend_on_company(engine: Engine, samples: list[Sample]) -> None:
    engine._ends = frozenset()
    warm = SamplingConfig(temperature=1.5, top_k=20, seed=3)
    together = engine.generate(samples, max_new_tokens=4, sampling=warm)
    assert together == [engine.generate([one], max_new_tokens=4, sampling=warm)[0] for one in samples]
    assert together != engine.generate(samples, max_new_tokens=4)


def test_zeroed_tiles_keep_ids_and_change_answers(engine: Engine, samples: list[Sample]) -> None:
    seen, blind = engine.prepare(samples[3]), engine.prepare(samples[3], zero_tiles=True)
    np.testing.assert_array_equal(seen.example.tokens, blind.example.tokens)
    assert seen.tiles.any()
    assert not blind.tiles.any()
    assert not torch.allclose(plain_logits(engine, seen, []), plain_logits(engine, blind, []), atol=1e-3)


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
        prompt = engine.prepare(sample)
        length = len(prompt.example.tokens)
        np.testing.assert_array_equal(prompt.example.tokens, trained.tokens[:length])
        assert trained.labels[length - 1] == trained.tokens[length], "the first label is the answer's first token"
        assert (trained.labels[: length - 1] == IGNORE_INDEX).all()
        assert prompt.example.tiles == trained.tiles
        for tile, slot in enumerate(trained.tiles):
            pixels = render_tiles(trained.media[slot.media], [slot], SPEC)[0]
            np.testing.assert_array_equal(prompt.tiles[tile].numpy(), pixels)


def test_the_limit_of_positions_ends_an_answer(engine: Engine) -> None:
    engine._ends = frozenset()
    longest = engine.config.max_position_embeddings
    short = len(engine.prepare(question("the")).example.tokens)
    per_word = len(engine.prepare(question("the the the")).example.tokens) - short
    sample = question("the" + " the the" * ((longest - short - 3) // per_word))
    room = longest - len(engine.prepare(sample).example.tokens)
    assert 0 < room < 20
    assert len(engine.generate([sample], max_new_tokens=50)[0].ids) == room
    with pytest.raises(DataError, match="overlong"):
        engine.generate([question("the" + " the the" * longest)])


def test_an_unreadable_sample_does_not_stop_the_others(engine: Engine, samples: list[Sample], folder: Path) -> None:
    engine._ends = frozenset()
    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    mixed = [samples[0], question("Which?", images=[broken]), samples[1]]
    outcomes = list(engine.stream(mixed, max_new_tokens=3))
    assert [number for number, _ in outcomes] == [0, 1, 2]
    assert isinstance(outcomes[1][1], DataError)
    assert [outcomes[0][1], outcomes[2][1]] == engine.generate(samples[:2], max_new_tokens=3)
    with pytest.raises(DataError, match=r"broken\.png"):
        engine.generate(mixed)


@pytest.mark.slow
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


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Engine.load(tmp_path / "nothing")
